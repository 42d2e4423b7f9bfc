"""A transformers model of a folder, and its greedy answers to conversations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hpa.data.encode import Encoder
from hpa.data.files import Conversation, DataError
from hpa.data.quiet import quiet

__all__ = ["answer", "load_model"]


def load_model(
    folder: Path,
    *,
    argument: str,
    dtype: str = "auto",
    safetensors: bool | None = None,
    trust_remote_code: bool = False,
) -> torch.nn.Module:
    """The model of a folder, in eval mode; one that takes pictures where the folder has such a one.

    Args:
        argument: what the folder is called in an error.
        dtype: torch's name of one, or ``"auto"``: as stored.
        safetensors: ``True``: no other files of weights; ``None``: as transformers finds them.

    Raises:
        DataError: transformers cannot load it.
    """
    import transformers

    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    try:
        config = transformers.AutoConfig.from_pretrained(folder, **options)
        pictured = type(config) in transformers.AutoModelForImageTextToText._model_mapping
        kind = transformers.AutoModelForImageTextToText if pictured else transformers.AutoModelForCausalLM
        stored: Any = dtype if dtype == "auto" else getattr(torch, dtype)
        with quiet():
            options |= {"dtype": stored, "use_safetensors": safetensors, "output_loading_info": True}
            loaded: Any = kind.from_pretrained(folder, **options)
    except RuntimeError as error:
        if "mismatch" not in str(error):
            raise
        raise DataError(f"{argument}: the weights of {folder} have other shapes than its config.json says") from error
    except (OSError, ValueError, KeyError) as error:
        first = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise DataError(f"{argument}: transformers cannot load {folder} ({first})") from error
    model, about = loaded
    missing = sorted(about["missing_keys"])
    if missing:
        raise DataError(f"{argument}: {folder} has no weights for {missing[0]} ({len(missing)} missing in all)")
    evaluated: torch.nn.Module = model.eval()
    return evaluated


def answer(
    model: torch.nn.Module, encoder: Encoder, conversations: Sequence[Conversation], *, max_new_tokens: int
) -> list[str]:
    """What the model says, greedily, to conversations that end with a question; answered as one batch."""
    from transformers import GenerationConfig

    own: Any = getattr(model, "generation_config", None)
    tokenizer = encoder.tokenizer
    end = getattr(own, "eos_token_id", None)
    end = tokenizer.eos_token_id if end is None else end
    pad = tokenizer.pad_token_id
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=end,
        pad_token_id=pad if pad is not None else tokenizer.eos_token_id,
    )
    batch = encoder.asked(conversations)
    device = next(model.parameters()).device
    generate: Any = model.generate
    out = generate(**{key: value.to(device) for key, value in batch.items()}, generation_config=settings)
    asked = batch["input_ids"].shape[1]
    return [text.strip() for text in tokenizer.batch_decode(out[:, asked:], skip_special_tokens=True)]
