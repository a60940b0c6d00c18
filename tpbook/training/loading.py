"""How training photographs become batches: workers decode, crop and flip in uint8, the device does the rest.

Handing over a quarter of the bytes, and resizing with torchvision's kernel instead of Pillow's, a worker delivers more
than twice as many images a second; `python -m tpbook.timing.loading` measures it on files of your own.

Chapter: :doc:`/book/reproduction`
"""

import torch
from timm.data import create_transform, resolve_model_data_config
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.transforms import Compose, PILToTensor, ToPILImage, v2


class Crop(RandomResizedCropAndInterpolation):
    """timm's random resized crop, draw for draw, of a uint8 tensor (C, H, W), resized by torchvision.

    Like Pillow it antialiases, and rounds to whole levels after each direction: one value in a hundred differs, by a
    level or two of 255.
    """

    def __call__(self, image):
        box = self.get_params(image, self.scale, self.ratio)  # top, left, height, width
        return v2.functional.resized_crop(image, *box, self.size, self.interpolation)


def timms(recipe, model, **changes):
    """timm's own transform of a recipe, PIL RGB image → (3, H, W) float32, all of it in the worker.

    Args:
        recipe: a `Recipe`; `min_scale`, `hflip`, `color_jitter`, `auto_augment` and `random_erasing` are read.
        model: says the image size, how to interpolate, and the mean and standard deviation that it was trained with.
        **changes: other arguments of `timm.data.create_transform`.
    """
    config = resolve_model_data_config(model)
    return create_transform(**{
        "input_size": config["input_size"], "is_training": True, "scale": (recipe.min_scale, 1), "hflip": recipe.hflip,
        "color_jitter": recipe.color_jitter or None, "auto_augment": recipe.auto_augment or None,
        "re_prob": recipe.random_erasing, "re_mode": "pixel", "interpolation": config["interpolation"],
        "mean": config["mean"], "std": config["std"], **changes,
    })  # fmt: skip


def augmented(recipe, model):
    """What of `timms` a worker does: all that may stay in uint8.

    Every random number of it is drawn as timm draws it, in that order. Colours are changed by timm in Pillow: recipes
    with `auto_augment` or `color_jitter`, and no others, pay for the way there and back.

    Args:
        recipe, model: as `timms` takes them.

    Returns:
        a transform, PIL RGB image → (3, H, W) uint8; `finisher` does what is left.
    """
    geometry, colours, last = (part.transforms for part in timms(recipe, model, use_prefetcher=True, separate=True))
    crop, *flip = geometry
    crop = Crop(crop.size, crop.scale, crop.ratio, resolve_model_data_config(model)["interpolation"])
    return Compose([PILToTensor(), crop, *flip, *([ToPILImage(), *colours, *last] if colours else [])])


def finisher(recipe, model, device):
    """What of `timms` the device does, a batch at a time.

    Args:
        recipe, model: as `timms` takes them.
        device: where to.

    Returns:
        a function, (B, 3, H, W) uint8 → float32 on the device: normalised, then with rectangles of noise. Images that
        come as floating-point numbers, as digits do, are finished already: they are only moved.
    """
    config = resolve_model_data_config(model)
    steps = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(config["mean"], config["std"], inplace=True)]
    if recipe.random_erasing:
        steps.append(RandomErasing(recipe.random_erasing, mode="pixel", device=device))
    rest = v2.Compose(steps)

    def finish(images):
        images = images.to(device, non_blocking=True)
        return images if images.is_floating_point() else rest(images)

    return finish
