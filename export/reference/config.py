"""Obeys or refuses config.json: each setting of the computation is read, equals what we compute anyway, or is an error.

A key that is read nowhere could change what a model computes, and the self-test would agree with the wrong graphs,
because its reference uses the same numbers. So a key of a known meaning must have the value that our modules compute,
a key without meaning for inference is ignored, and any other key is a note.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from trol_edge.errors import CheckpointError
from trol_edge.reading import printable

# Keys of a decoder's configuration that change what it computes -> the values that match our modules. None, and a
# missing key, always match.
DECODER: dict[str, Collection[Any]] = {
    "attention_bias": (False,),
    "attention_multiplier": (),
    "attn_logit_softcapping": (),
    "bias": (False,),
    "clip_qkv": (),
    "embedding_multiplier": (1,),
    "final_logit_softcapping": (),
    "hidden_act": ("silu", "swish"),
    "hidden_activation": ("silu", "swish"),
    "layer_types": (),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "mlp_bias": (False,),
    "no_rope_layers": (),
    "num_experts": (),
    "num_local_experts": (),
    "parallel_attn": (False,),
    "partial_rotary_factor": (1,),
    "pretraining_tp": (1,),
    "qk_layernorm": (False,),
    "qk_norm": (False,),
    "quantization_config": (),
    "query_pre_attn_scalar": (),
    "residual_multiplier": (1,),
    "scale_embeddings": (False,),
    "tie_word_embeddings": (False,),
    "use_sliding_window": (False,),
}
# The same for a vision tower's configuration.
TOWER: dict[str, Collection[Any]] = {"num_channels": (3,), "quantization_config": ()}
# Keys without effect here, about training, generation, the library that saved them, and tokens that are read elsewhere.
_INERT = """
_attn_implementation _attn_implementation_autoset _commit_hash _name_or_path add_cross_attention architectures
attention_dropout attn_implementation auto_map bad_words_ids begin_suppress_tokens bos_token_id
chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample drop_path_rate
dropout dtype early_stopping embd_pdrop encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task
forced_bos_token_id forced_eos_token_id id2label initializer_factor initializer_range is_decoder is_encoder_decoder
label2id length_penalty max_length min_length model_type no_repeat_ngram_size num_beam_groups num_beams
num_return_sequences output_attentions output_hidden_states output_scores pad_token_id prefix problem_type
projection_dim pruned_heads remove_invalid_values repetition_penalty resid_pdrop return_dict return_dict_in_generate
sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k
top_p torch_dtype torchscript transformers_version typical_p use_bfloat16 use_bn use_cache use_flash_attn
"""
INERT = frozenset(_INERT.split())
# Keys that transformers saves with every configuration, even a tower's, where they mean nothing.
OF_EVERY_CONFIG = ("eos_token_id", "tie_word_embeddings")
ADVICE = "this is not a published TroL's: copy config.json again, or export a model without it"


def obey(
    config: Mapping[str, Any], where: str, read: Collection[str], fixed: Mapping[str, Collection[Any]]
) -> list[str]:
    """Refuse settings of a part of a configuration that our modules do not support; returns notes about unknown keys.

    read: keys that the family reads itself. fixed: a table like DECODER. Raises a CheckpointError that lists all.
    """
    wrong = [
        f"{key} {value!r:.80}"
        for key, value in config.items()
        if key in fixed and value is not None and not any(_same(value, allowed) for allowed in fixed[key])
    ]
    if wrong:
        raise CheckpointError(
            f"config.json: {where}{', '.join(map(printable, wrong))} changes what is computed and is not supported; "
            f"{ADVICE}"
        )
    known = {*read, *fixed, *INERT}
    unknown = sorted(key for key in config if key not in known)
    names = ", ".join(printable(where + key)[:80] for key in unknown)
    return [f"config.json: unknown and ignored: {names}"] if unknown else []


def _same(value: Any, allowed: Any) -> bool:
    return (
        type(value) in (bool, int, float, str)
        and value == allowed
        and isinstance(value, bool) == isinstance(allowed, bool)
    )


def require_head_dim(config: Mapping[str, Any], hidden: int, heads: int) -> int:
    """The size of a head, the width divided by the heads. Raises CheckpointError for a configuration that differs."""
    size = hidden // heads
    if config.get("head_dim") not in (None, size) or hidden % heads:
        raise CheckpointError(
            f"config.json: head_dim {config.get('head_dim')!r:.80} is not hidden_size {hidden} divided by "
            f"num_attention_heads {heads}, which no TroL has; {ADVICE}"
        )
    return size


def rope_settings(config: Mapping[str, Any]) -> tuple[float, str, dict[str, Any]]:
    """Base, type and further settings of the rotary embedding, from either place where configurations have them.

    Up to transformers 4 these are rope_theta and rope_scaling with a type (later: rope_type), since 5 rope_parameters.
    The type is "default", "su" or another, as it is written there; settings have no None.
    """
    found: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        part = config.get(key)
        if part is None:
            continue
        if not isinstance(part, Mapping) or any(isinstance(value, Mapping) for value in part.values()):
            raise CheckpointError(f"config.json: {key} {part!r:.80} is not one set of settings; {ADVICE}")
        for name, value in part.items():
            name = "type" if name == "rope_type" else name
            value = "su" if name == "type" and value == "longrope" else value  # the same, renamed
            if value is not None and found.setdefault(name, value) != value:
                raise CheckpointError(
                    f"config.json: {name} of the rotary embedding is {value!r:.80} and {found[name]!r}"
                )
    base = found.pop("rope_theta", None)
    given = config.get("rope_theta")
    if base is not None and given is not None and base != given:
        raise CheckpointError(f"config.json: rope_theta is {given!r:.80}, and {base!r:.80} in rope_parameters")
    base = given if base is None else base
    if base is None:
        raise CheckpointError("config.json lacks rope_theta; copy it again")
    if not _same(found.pop("partial_rotary_factor", 1), 1):
        raise CheckpointError(f"config.json: partial_rotary_factor is not 1, which is not supported; {ADVICE}")
    return float(base), str(found.pop("type", "default")), found


def require_plain_rope(kind: str, settings: Mapping[str, Any], limit: int) -> None:
    """Raise CheckpointError if the settings change the rotary embedding of positions below `limit`.

    "dynamic" does not, because it begins above max_position_embeddings, which export does not reach.
    """
    allowed = {"default": (), "dynamic": ("factor", "original_max_position_embeddings"), "linear": ("factor",)}
    wrong = [f"{key} {value!r:.80}" for key, value in settings.items() if key not in allowed.get(kind, ())]
    if kind not in allowed or (kind == "linear" and settings.get("factor") != 1):
        wrong.insert(0, f"type {kind!r:.80} with factor {settings.get('factor')!r:.80}")
    if kind == "dynamic" and settings.get("original_max_position_embeddings", limit) < limit:
        wrong.append(f"original_max_position_embeddings below max_position_embeddings {limit}")
    if wrong:
        raise CheckpointError(f"config.json: rope_scaling {printable(', '.join(wrong))} is not supported; {ADVICE}")


def su_amplitude(config: Mapping[str, Any], settings: Mapping[str, Any]) -> tuple[int, float]:
    """The most tokens with the short factors, and the amplitude of cos and sin, of a "su" rotary embedding."""
    limit = config["max_position_embeddings"]
    places = (config.get("original_max_position_embeddings"), settings.get("original_max_position_embeddings"))
    originals = {value for value in places if value is not None}
    if len(originals) != 1:
        raise CheckpointError(f"config.json: original_max_position_embeddings is {sorted(originals) or 'missing'}")
    original = originals.pop()
    scale = limit / original
    known = {"short_factor", "long_factor", "original_max_position_embeddings", "attention_factor", "factor"}
    wrong = [f"{key} {value!r:.80}" for key, value in settings.items() if key not in known]
    if not _same(settings.get("factor", scale), scale):
        wrong.append(f"factor {settings['factor']!r:.80}, and not {scale:g}, by which the positions grew")
    if wrong:
        raise CheckpointError(f"config.json: rope_scaling {printable(', '.join(wrong))} is not supported; {ADVICE}")
    usual = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
    return original, float(settings.get("attention_factor", usual))


def end_tokens(value: Any) -> list[int]:
    """The ids that end an answer; the value is one id or a list of them."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < 1 << 31 for i in ids):
        raise CheckpointError(
            f"eos_token_id {value!r:.80} is neither a token nor a list of tokens; copy the config files again"
        )
    return list(dict.fromkeys(ids))


def differing(pairs: Mapping[str, tuple[Any, Any]]) -> Iterator[str]:
    """Describe keys with wrong values; pairs: name -> (found, expected), where found may be None."""
    for name, (found, expected) in pairs.items():
        if found is not None and found != expected:
            yield f"{name} {found!r:.80} instead of {expected!r}"
