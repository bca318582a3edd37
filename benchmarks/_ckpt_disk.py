import os, statistics, tempfile, threading, time, torch
import torch.utils.serialization as us
n = 600_000_000
g = [torch.randn(n // 60, device="cuda") for _ in range(60)]
h = [x.cpu() for x in g]
from safetensors.torch import save_file
import xxhash
print(os.cpu_count(), torch.__version__)
for d0 in ("/tmp", "."):
    d = tempfile.mkdtemp(dir=d0); st = os.statvfs(d); print(d, st.f_bavail * st.f_frsize / 2**30, "GiB free"); os.system(f"df -T {d} | tail -1")
    def timed(name, f, k=3):
        r = []
        for _ in range(k):
            torch.cuda.synchronize(); s = time.perf_counter(); f(); torch.cuda.synchronize(); r.append(time.perf_counter() - s)
            for x in os.listdir(d): os.unlink(d + "/" + x)
        print(f"{name:34s}{statistics.median(r):8.3f} {[round(x, 2) for x in r]}", flush=True)
    def raw(sync):
        def f():
            fd = os.open(d + "/r", os.O_WRONLY | os.O_CREAT)
            for x in h:
                v = memoryview(x.numpy()).cast("B")
                for i in range(0, len(v), 1 << 22): os.write(fd, v[i:i + (1 << 22)])
            if sync: os.fsync(fd)
            os.close(fd)
        return f
    def par(sync):
        def one(j):
            fd = os.open(d + f"/r{j}", os.O_WRONLY | os.O_CREAT)
            for x in h[j::4]:
                v = memoryview(x.numpy()).cast("B")
                for i in range(0, len(v), 1 << 22): os.write(fd, v[i:i + (1 << 22)])
            if sync: os.fsync(fd)
            os.close(fd)
        def f():
            t = [threading.Thread(target=one, args=(j,)) for j in range(4)]
            [x.start() for x in t]; [x.join() for x in t]
        return f
    timed("raw write 2.4 GB", raw(False)); timed("raw write + fsync", raw(True))
    timed("4 threads write", par(False)); timed("4 threads write + fsync", par(True))
    sd = {str(i): x for i, x in enumerate(g)}; sh = {str(i): x for i, x in enumerate(h)}
    timed("torch.save cuda", lambda: torch.save(sd, d + "/o"), 2)
    torch.serialization.set_crc32_options(False)
    timed("torch.save cuda no crc", lambda: torch.save(sd, d + "/o"), 2)
    us.config.save.use_pinned_memory_for_d2h = True
    timed("torch.save cuda no crc pinned", lambda: torch.save(sd, d + "/o"), 3)
    us.config.save.use_pinned_memory_for_d2h = False
    timed("torch.save cpu no crc", lambda: torch.save(sh, d + "/o"), 2)
    torch.serialization.set_crc32_options(True)
    timed("save_file cuda", lambda: save_file(sd, d + "/o"), 2); timed("save_file cpu", lambda: save_file(sh, d + "/o"), 2)
    os.rmdir(d)
d = "/tmp"
b = torch.empty(1 << 26, dtype=torch.uint8, pin_memory=True).view(torch.float32)
def T(name, f):
    for _ in range(2): s = time.perf_counter(); f(); torch.cuda.synchronize(); e = time.perf_counter() - s
    print(f"{name:34s}{e:8.3f}", flush=True)
T("d2h pageable fresh", lambda: [x.cpu() for x in g])
T("d2h pinned fixed buffer", lambda: [b[:x.numel()].copy_(x[:b.numel()]) for x in g])
T("d2h pageable reused", lambda: [y.copy_(x) for x, y in zip(g, h)])
def hh():
    k = xxhash.xxh3_128()
    for x in h: k.update(memoryview(x.numpy()).cast("B"))
T("xxh3", hh)
