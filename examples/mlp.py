"""Train, prune, save and load a small MLP of odd sizes."""

import torch
from torch import nn

import sgtriton


def make_mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(37, 53), nn.ReLU(), nn.Linear(53, 53), nn.ReLU(), nn.Linear(53, 11)
    )


def main(steps: int = 600) -> None:
    torch.manual_seed(0)
    teacher, model = make_mlp(), sgtriton.patch(make_mlp(), block=(4, 4))
    optimizer = torch.optim.Adam(sgtriton.param_groups(model, lr=1e-2))
    controller = sgtriton.SparsityController(model, target=0.8, steps=steps)
    for step in range(steps):
        x = torch.randn(128, 37)
        error = nn.functional.mse_loss(model(x), teacher(x).detach())
        optimizer.zero_grad()
        (error + controller.penalty()).backward()
        optimizer.step()
        controller.step()
        if step % 100 == 99:
            now = controller.statistics
            print(f"step {step + 1}: error {error:.4f}, open {now.open_share:.1%}")
    sgtriton.sparsify(model.eval())
    sgtriton.save(model, "mlp.safetensors")
    fresh = sgtriton.load(make_mlp(), "mlp.safetensors").eval()
    x = torch.randn(5, 37)
    assert torch.equal(fresh(x), model(x))
    print(sgtriton.summary(fresh))


if __name__ == "__main__":
    main()
