"""The scrubber's training images: forget images, and retain images without the concept."""

from torch import Tensor

from unlearning.concepts import UnlearningTask
from unlearning.errors import UserError
from unlearning.models.diffusion import DiffusionModel
from unlearning.training.forget_retain import encoded


def forget_and_retain(model: DiffusionModel, task: UnlearningTask) -> tuple[Tensor, Tensor]:
    """Latents of the task's forget and retain images, (N, C, H, W) each.

    Raises:
        UserError: If there are no forget images, or some of them are retain images too.
    """
    if not len(task.forget_images):
        raise UserError(
            "The scrubber learns from images, but this dataset has no forget images. Use dataset=folder "
            "forget=/a/folder, or one of the emoji datasets."
        )
    forget = {hash(image.tobytes()) for image in task.forget_images}
    if both := sum(hash(image.tobytes()) in forget for image in task.retain_images):
        raise UserError(
            f"{both} of the {len(task.retain_images)} retain images are forget images too. Remove them from one of "
            "the two sets."
        )
    return encoded(model, task.forget_images), encoded(model, task.retain_images)
