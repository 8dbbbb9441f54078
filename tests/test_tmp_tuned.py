import torch
from eval.methods import make_method
from eval.methods.base import Fitted
def test_x(digits_world, side_world, text_world):
    for w in (digits_world, side_world, text_world):
        g = w.group("val", "support"); q=w.group("val","query")
        g=g.pick([torch.arange(n) for n in (1,3,20,7)])
        for kw in ({}, {"rate":3e-2},{"steps":40,"rate":1e-2}):
            m=make_method("bottleneck",**kw)
            t=m.personalise(w,Fitted(),g,.1).logits(q)
            o=max((m.personalise(w,Fitted(),g.rows([i]),.1).logits(q.rows([i]))[0]-t[i,:q.counts[i]]).abs().max().item() for i in range(4))
            print(w.env,kw,"together vs alone",o, t.abs().max().item())
