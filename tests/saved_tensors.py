"""Memory that a real step saves for its backward pass, to compare with the planner's."""

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


def bytes_saved_by_a_step(task: nn.Module, batch: dict) -> int:
    """Bytes of the tensors that a forward pass saves, without weights."""
    storages = {}

    def note(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        loss = task(batch)["loss"]
    of_weights = {parameter.untyped_storage().data_ptr() for parameter in task.parameters()}
    loss.backward()
    return sum(size for address, size in storages.items() if address not in of_weights)
