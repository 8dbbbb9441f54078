import os, time, pytest
from eval.conformance import check_method
from eval.methods import METHODS, method_class
QUICK = {"ppo": {"total_timesteps": 256}, "self_critical": {"timesteps": 256}, "joint": {"steps": 20}, "feddpa": {"joint_steps": 20}, "hard_concrete": {"steps": 20}}
def test_walk(request):
    world = request.getfixturevalue(os.environ["WORLD"])
    pick = os.environ.get("PICK")
    for name in (pick.split(",") if pick else METHODS):
        try:
            t = time.process_time(); k = method_class(name)
            if os.environ["WORLD"] == "side_world" and k.through_backbone: continue
            out = check_method(name, world, **QUICK.get(name, {}))
            res = f"refuses: {out}" if out else "ok"
        except AssertionError as e: res = f"FAIL {str(e)[:400]}"
        except Exception as e: res = f"ERROR {type(e).__name__} {str(e)[:300]}"
        print(f"\n## {os.environ['WORLD']} {name} {time.process_time()-t:.1f}s {res}", flush=True)
