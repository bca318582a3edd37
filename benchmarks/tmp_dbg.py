import sys; sys.path[:0]=["."]
import torch, time, statistics
from benchmarks.gpu import *
from qat.layers import linear_function as lf
from qat.layers.quant_linear import QuantLinear
from torch import nn
dev=torch.device("cuda",0)
r=Report("x",device="cuda")
L=int(sys.argv[1]) if len(sys.argv)>1 else 8
m=make_model("llama-8b","MXFP4",L,"cuda"); s=TrainingStep(m,make_batch(m,4,2048))
lin=[l for l in m.modules() if isinstance(l,QuantLinear)]
def setv(v):
    for l in lin:
        l.__class__ = nn.Linear if v=="bf16" else QuantLinear
        if v!="bf16": l.in_fp8 = v.startswith("fp8")
    lf._KEEP="keep" in v; lf._DW32="dw" in v
V=["bf16","qat","fp8","fp8 dw","fp8 dw keep","qat dw"]
ts={v:[] for v in V}; peak={}
for v in V:
    setv(v); s(); torch.cuda.synchronize(); torch.cuda.reset_peak_memory_stats(); s(); torch.cuda.synchronize(); peak[v]=torch.cuda.max_memory_allocated()/2**30
for i in range(6):
    for v in V:
        setv(v); torch.cuda.synchronize(); t=time.perf_counter(); s(); torch.cuda.synchronize(); ts[v].append(time.perf_counter()-t)
b=statistics.median(ts["bf16"])
for v in V: print(L,"layers",v,f"{statistics.median(ts[v])*1e3:.1f} ms {statistics.median(ts[v])/b:.3f} peak {peak[v]:.1f} {peak[v]/peak['bf16']:.3f}")
# gradients
m.zero_grad(); setv("fp8"); s.loss().backward(); g=[l.weight.grad.clone() for l in lin[:3]]; m.zero_grad(); setv("fp8 dw keep"); s.loss().backward(); print("grad rel",[((l.weight.grad-a).norm()/a.norm()).item() for l,a in zip(lin[:3],g)]); m.zero_grad()
if len(sys.argv)>2:
    from torch.profiler import profile, ProfilerActivity
    for v in ("bf16","fp8 dw keep"):
        setv(v); s(); torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as p: s(); torch.cuda.synchronize()
        ev=sorted([e for e in p.key_averages()],key=lambda e:-e.self_device_time_total)
        print(v,"total ms",sum(e.self_device_time_total for e in ev)/1e3)
        for e in ev[:30]: print(f"{e.self_device_time_total/1e3:8.2f} {e.count:5d} {e.key[:150]}")
del m,s; free_memory()
torch.manual_seed(0)
for i in range(6):
    x=torch.randn(8192,14336,device="cuda").bfloat16()
    a,_=ops.to_rows(x.detach(),"mxfp4","even",torch.bfloat16)
    if int(a.lost.sum()):
        w=a.lost.nonzero()[:3,0].tolist(); print("lost",int(a.lost.sum()),w)
        for j in w:
            bl=x[j].float().abs().view(-1,32).amax(1); print(bl.min().item(),bl.max().item(), x[j].isfinite().all().item(), (x[j]==0).sum().item())
