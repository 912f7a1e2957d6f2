"""Where a tokenizer, the text tower and the length of texts fit together.

Source: the positions of RoBERTa and ModernBERT in transformers.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from unimo3.model.config import TextConfig, Unimo3Config


def tokenizer_errors(
    text: "TextConfig", tokenizer: "PreTrainedTokenizerBase", max_tokens: int, is_trained: bool
) -> list[str]:
    """Return where a text tower, a tokenizer and the length of texts do not fit together, one line per error.

    Args:
        is_trained: whether the tower has weights already, so that its padding id cannot be changed.
    """
    errors = []
    largest = largest_id(tokenizer)
    if largest >= text.vocab_size:
        errors.append(
            f"model.text.vocab_size: {text.vocab_size}: data.tokenizer has {len(tokenizer)} entries, the largest id is "
            f"{largest}; set it to at least {largest + 1}, or use the tokenizer that belongs to the weights"
        )
    padding_id = tokenizer.pad_token_id
    assert isinstance(padding_id, int)  # `load_tokenizer` has checked it
    if is_trained and padding_id != text.pad_token_id:
        errors.append(
            f"data.tokenizer: pads with the id {padding_id}, the weights with {text.pad_token_id}; use the tokenizer "
            "that belongs to the weights"
        )
    return errors + length_errors(text, max_tokens, padding_id)


def largest_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The largest id of a tokenizer's entries; more than their number where ids are missing between them."""
    return max(tokenizer.get_vocab().values())


def max_text_tokens(text: "TextConfig", padding_id: int) -> int:
    """Tokens that a text can have: RoBERTas count positions from behind the padding id, ModernBERT from 0."""
    return max(0, text.max_position_embeddings - _first_position(text, padding_id))


def _first_position(text: "TextConfig", padding_id: int) -> int:
    return 0 if text.model_type == "modernbert" else padding_id + 1


def length_errors(text: "TextConfig", max_tokens: int, padding_id: int) -> list[str]:
    """Return an error if texts can be longer than a text tower has positions for."""
    most, first = max_text_tokens(text, padding_id), _first_position(text, padding_id)
    if max_tokens <= most:
        return []
    allowed = (
        f"data.max_text_tokens: {max_tokens}: model.text.max_position_embeddings {text.max_position_embeddings} allows "
        f"{most}"
    )
    if not first:
        return [f"{allowed}; lower it"]
    return [
        f"{allowed}, since positions are counted from behind the padding id {padding_id}; lower it, use a tokenizer "
        f"with a lower padding id, or pretrain with model.text.max_position_embeddings {max_tokens + first}"
    ]


def resolve_tokens(config: "Unimo3Config", tokenizer: "PreTrainedTokenizerBase") -> None:
    """Give a configuration the tokenizer's special ids, and the tokenizer the length that the positions allow."""
    text = config.text_config
    text.pad_token_id = tokenizer.pad_token_id
    text.bos_token_id = tokenizer.bos_token_id
    text.eos_token_id = tokenizer.eos_token_id
    if text.model_type == "modernbert":
        text.cls_token_id = tokenizer.cls_token_id
        text.sep_token_id = tokenizer.sep_token_id
    tokenizer.model_max_length = min(tokenizer.model_max_length, max_text_tokens(text, text.pad_token_id))
