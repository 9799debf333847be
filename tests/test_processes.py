"""Several processes see what one would see."""
import subprocess
import sys

WORKER = """
import torch, torch.distributed as dist
from bitvae.quantizer import scale_loss
dist.init_process_group("gloo")
r = dist.get_rank()
torch.manual_seed(0)
v = torch.nn.functional.normalize(torch.randn(4, 16, 3, 3), dim=1)
whole = v.clone().requires_grad_(); mine = v[2 * r : 2 * r + 2].clone().requires_grad_()
import bitvae.quantizer as q
loss = scale_loss(mine).batch_entropy; loss.backward()
q.over_ranks = lambda mean: mean
reference = scale_loss(whole).batch_entropy; reference.backward()
torch.testing.assert_close(loss, reference)
torch.testing.assert_close(mine.grad / 2, whole.grad[2 * r : 2 * r + 2])   # averaged over processes it is the whole batch's
print("agreed")
"""


def test_batch_entropy_does_not_depend_on_the_number_of_processes(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    run = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", tmp_path / "worker.py"], capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.count("agreed") == 2, run.stderr[-3000:]
