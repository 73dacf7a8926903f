"""Models of transformers for a case, with weights that hide no mistake, and what they compute on a batch."""

import contextlib
import logging
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import safetensors.numpy
import torch
import transformers as hf

from tests.interop.spaces import PAD, Case

hf.utils.logging.disable_progress_bar()

Arrays = dict[str, np.ndarray]


def torch_model(case: Case, seed: int = 0) -> Any:
    """The model, in float32 and evaluation mode, with biases and norms off their initial values."""
    torch.manual_seed(seed)
    config = hf.CONFIG_MAPPING[case.model_type](**case.json)
    # Its other attentions have other answers for rows that may see nothing.
    config._attn_implementation = "eager"
    # Its other experts take no widths that are not multiples of 16 bytes.
    config._experts_implementation = "eager"
    pooler = (
        {"add_pooling_layer": case.pooler} if case.architecture in ("BertModel", "ViTModel") else {}
    )
    model = getattr(hf, case.architecture)(config, **pooler).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape))
        if hasattr(model, "cls") and hasattr(model.cls, "predictions"):
            # One parameter in transformers 4, and two, of which the latter does nothing, in an untied model of 5.
            head = model.cls.predictions
            head.bias.copy_(head.decoder.bias)
    return model


def saved_tensors(folder: pathlib.Path) -> Arrays:
    """The tensors that transformers wrote into a folder."""
    return safetensors.numpy.load_file(folder / "model.safetensors")


def saved_gradients(model: Any, folder: pathlib.Path) -> Arrays:
    """The gradients of a model under the names that its parameters have in a file.

    The names in memory are others since transformers 5: it is left to write the gradients as it would the weights.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.0 if parameter.grad is None else parameter.grad)
    model.save_pretrained(folder)
    return saved_tensors(folder)


def batch(case: Case, side: str, seed: int = 0, seq: int = 9) -> Arrays:
    """Three rows, with 0, 3 and 6 tokens of padding on one side."""
    random = np.random.default_rng(seed)
    if case.model_type == "vit":
        size = case.fields["image_size"]
        size = size if isinstance(size, int) else size[0]
        shape = (2, size, size, case.fields["num_channels"])
        return {"images": random.normal(size=shape).astype(np.float32)}
    ids = random.integers(PAD + 1, case.fields["vocab_size"], (3, seq)).astype(np.int32)
    mask = np.ones(ids.shape, np.int32)
    for row, pads in enumerate((0, 3, 6)):
        mask[row, slice(0, pads) if side == "left" else slice(seq - pads, seq)] = 0
    arrays = {"ids": np.where(mask == 1, ids, PAD).astype(np.int32), "mask": mask}
    if case.model_type == "bert":
        types = random.integers(0, case.fields["type_vocab_size"], ids.shape)
        arrays["types"] = types.astype(np.int32)
    return arrays


def torch_outputs(case: Case, model: Any, arrays: Arrays) -> dict[str, Any]:
    """What the model gives, under our names of its outputs."""
    if case.model_type == "vit":
        out = model(torch.tensor(arrays["images"].transpose(0, 3, 1, 2)))
    else:
        mask = torch.tensor(arrays["mask"])
        inputs = {"input_ids": torch.tensor(arrays["ids"]).long(), "attention_mask": mask}
        if case.model_type not in ("bloom", "opt"):  # those two count real tokens themselves
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        if case.model_type == "bert":
            inputs["token_type_ids"] = torch.tensor(arrays["types"]).long()
        if case.architecture == "BertForMultipleChoice":  # choices of one question
            out = model(**{name: value[None] for name, value in inputs.items()})
            return {"choice": out.logits[0][:, None]}
        out = model(**inputs)
    name = case.architecture.removeprefix(case.family.class_name)
    match name:
        case "Model":
            pooled = {"pooled": out.pooler_output} if case.pooler else {}
            return {"hidden": out.last_hidden_state} | pooled
        case "ForPreTraining":
            return {"mlm": out.prediction_logits, "nsp": out.seq_relationship_logits}
        case "ForQuestionAnswering":
            return {"span": torch.stack([out.start_logits, out.end_logits], -1)}
    ours = {
        "LMHeadModel": "lm",
        "ForCausalLM": "lm",
        "ForMaskedLM": "mlm",
        "ForNextSentencePrediction": "nsp",
        "ForTokenClassification": "token_classes",
    }
    return {ours.get(name, "classes"): out.logits}


def torch_greedy(model: Any, arrays: Arrays, count: int) -> np.ndarray:
    """The tokens of prompt and answer."""
    out = model.generate(
        torch.tensor(arrays["ids"]).long(),
        attention_mask=torch.tensor(arrays["mask"]),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=PAD,
    )
    return out.numpy()


class _Collect(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


@contextlib.contextmanager
def complaints() -> Iterator[list[str]]:
    """Whatever transformers warns of meanwhile, such as missing or unexpected weights."""
    handler, logger = _Collect(), hf.utils.logging.get_logger("transformers")
    logger.addHandler(handler)
    hf.utils.logging.warning_once.cache_clear()
    try:
        yield handler.said
    finally:
        logger.removeHandler(handler)
