"""transformers' `TimmWrapperModel` and `TimmWrapperForImageClassification`, which hold a timm model."""

from .wrapper import Wrapper


class TimmWrapper(Wrapper):
    """The model in `.timm_model` is what is pruned; loss, `save_pretrained` and the rest stay the wrapper's."""

    name, held = "Hugging Face TimmWrapper", "timm_model"

    def fits(self, model):
        return any(
            cls.__name__ == "TimmWrapperPreTrainedModel" and cls.__module__.startswith("transformers.")
            for cls in type(model).__mro__
        )
