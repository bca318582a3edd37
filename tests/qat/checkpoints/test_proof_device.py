"""Where an export and its proof compute, and what a GPU's logits must do to count."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from helpers import save_llama, save_qat
from safetensors.torch import load_file

from qat.checkpoints import device as devices
from qat.checkpoints import logits_proof, pack
from qat.checkpoints.device import choose_device, compute_on, named_device
from qat.checkpoints.pack import export_checkpoint
from qat.checkpoints.pack_tensors import Packing
from qat.checkpoints.pipeline import CPU
from qat.checkpoints.verify import verify
from qat.checkpoints.verify_logits import Expected, VerificationError, begin_packed
from qat.errors import UserError

GPU = torch.device("cuda", 0)


@pytest.fixture
def a_gpu(monkeypatch):
    """A GPU with 1,000 bytes free, as far as the choice of a device asks."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
    for module in (devices, logits_proof):
        monkeypatch.setattr(module, "free_bytes", lambda device: 1000)


def test_a_gpu_is_chosen_where_it_has_the_memory_and_the_log_says_where_not(a_gpu, caplog):
    caplog.set_level("INFO", "qat")
    assert choose_device(None, 1000, "packing") == GPU and not caplog.text
    assert choose_device(None, 1001, "packing") == CPU and "packing needs 0.0 GiB on a GPU" in caplog.text
    assert choose_device("cpu", 0, "packing") == CPU
    assert choose_device("cuda", 10**9, "packing") == choose_device("cuda:0", 10**9, "packing") == GPU
    assert devices.in_words(GPU) == "cuda:0 (H100)"


def test_a_gpu_that_others_have_filled_is_left_to_them(a_gpu, caplog, monkeypatch):
    def fail(device):
        raise RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA")

    monkeypatch.setattr(devices, "free_bytes", fail)
    assert choose_device(None, 0, "packing") == CPU
    assert "packing is on the CPU, since cuda:0 cannot be used: CUDA error: out of memory" in caplog.text


def test_a_device_that_is_not_there_is_refused(a_gpu):
    with pytest.raises(UserError, match="--device 'cuda:1' is no device .*; choose one of cpu, cuda, cuda:0"):
        named_device("cuda:1")


def out_of_memory_on_a_gpu(device: torch.device) -> str:
    """Work that needs more memory than a GPU has."""
    if device != CPU:
        raise torch.OutOfMemoryError("CUDA out of memory")
    return "done"


def test_work_that_runs_out_of_memory_begins_anew_on_the_cpu_and_the_log_says_so(a_gpu, caplog):
    assert compute_on(GPU, None, "packing", out_of_memory_on_a_gpu) == "done"
    assert "packing ran out of memory on cuda:0 (H100), so it begins anew on the CPU" in caplog.text


def test_a_gpu_that_was_asked_for_and_lacks_memory_is_an_error_in_one_line(a_gpu):
    with pytest.raises(UserError, match="--device 'cuda:0' has too little free memory for packing; give --device cpu"):
        compute_on(GPU, "cuda:0", "packing", out_of_memory_on_a_gpu)


def test_another_error_of_a_gpu_is_raised(a_gpu):
    def fail(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        compute_on(GPU, None, "packing", fail)


def test_packing_that_begins_anew_writes_the_same_files(a_gpu, pair, tmp_path, monkeypatch):
    write, devices_ = Packing.write, []

    def fail_at_first(self, folder):
        devices_.append(self.device)
        begun, self.device = self.device, CPU
        size = write(self, folder)
        if begun != CPU:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return size

    monkeypatch.setattr(Packing, "write", fail_at_first)
    monkeypatch.setattr(pack, "choose_device", lambda *_: GPU)
    packed = export_checkpoint(pair[0], tmp_path / "packed")
    assert devices_ == [GPU, CPU]
    assert (packed / "model.safetensors").read_bytes() == (pair[1] / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, Path]:
    """A source and its packed folder."""
    source = save_qat(tmp_path_factory.mktemp("proof") / "source", {"torch.nn.Linear": "MXFP4"})
    return source, export_checkpoint(source, source / "packed")


@pytest.fixture
def computed_on(monkeypatch) -> list[str]:
    """Where both models were computed, in order; their logits are made up, and differ in one element on a GPU."""
    devices_: list[str] = []

    def begin_packed(stack, folder, input_ids, device, trust):
        devices_.append(f"packed {device}")
        logits = torch.zeros(1, 8, 260)
        logits[0, 3, 5] = 2.0**-20 if device != CPU else 0.0
        return lambda: logits

    def begin_fake_quantized(stack, source, folder, input_ids, rules, device, trust, experts):
        devices_.append(f"fake-quantized {device}")
        return lambda: Expected(torch.zeros(1, 8, 260), torch.zeros(1, 8, 260), False)

    monkeypatch.setattr(logits_proof, "begin_packed", begin_packed)
    monkeypatch.setattr(logits_proof, "begin_fake_quantized", begin_fake_quantized)
    monkeypatch.setattr(logits_proof, "choose_device", lambda *_: GPU)
    return devices_


def test_logits_that_differ_on_a_gpu_are_computed_again_on_the_cpu_which_decides(a_gpu, pair, computed_on, caplog):
    logits = verify(pair[1], pair[0], tokens=8, device="cpu")["logits"]
    on = ["cuda:0", "cuda:0", "cpu", "cpu"]
    assert [where.split()[1] for where in computed_on] == on and logits["bit_equal"]
    assert (logits["device"], logits["not_bit_equal_on"]) == ("the CPU", "cuda:0 (H100)")
    assert "on cuda:0 (H100) the logits differ by up to 9.5" in caplog.text


def test_logits_that_a_gpu_cannot_compute_are_computed_on_the_cpu(a_gpu, pair, computed_on, monkeypatch, caplog):
    begin = logits_proof.begin_packed

    def begin_packed(stack, folder, input_ids, device, trust):
        def fail():
            raise VerificationError("out of memory")

        return fail if device == GPU else begin(stack, folder, input_ids, device, trust)

    monkeypatch.setattr(logits_proof, "begin_packed", begin_packed)
    assert verify(pair[1], pair[0], tokens=8, device="cpu")["logits"]["bit_equal"]
    assert "on cuda:0 (H100) out of memory; they are computed again on the CPU" in caplog.text


def test_a_process_that_still_computes_ends_with_the_proof(tmp_path):
    def children() -> set[int]:  # other tests may have left some
        return {int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}

    with ExitStack() as processes:
        before = children()
        begin_packed(processes, tmp_path, torch.arange(8)[None], CPU)
        (child,) = children() - before
        os.kill(child, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_memory_of_the_host_is_known_on_linux():
    assert 0 < devices.free_host_bytes() < 2**50


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("scheme", ["MXFP4", "MXFP8", "NVFP4A16", "INT4_G32", "FP8"])
def test_a_gpu_packs_the_bytes_of_the_cpu_and_proves_them(tmp_path, scheme):
    source = save_llama(tmp_path / "source")
    for device in ("cpu", "cuda"):
        export_checkpoint(source, tmp_path / device, scheme=scheme, device=device)
    packed, reference = (load_file(tmp_path / device / "model.safetensors") for device in ("cuda", "cpu"))
    assert set(packed) == set(reference)
    assert all(torch.equal(packed[n].view(torch.uint8), reference[n].view(torch.uint8)) for n in packed)
    verdict = verify(tmp_path / "cuda", source, tokens=32, device="cuda")
    assert verdict["logits"]["bit_equal"] and verdict["logits"]["not_bit_equal_on"] is None
    assert "cuda" in verdict["logits"]["device"]
