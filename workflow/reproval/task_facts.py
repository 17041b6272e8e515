"""The requests that lm-eval will make of a model, counted with the model's own tokenizer and without an engine."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from reproval import encoding
from reproval.counted import Counted
from reproval.encoding import TEXTS_AT_ONCE, as_tokens, encode_pairs, encode_texts
from reproval.files import sha256_bytes, sha256_file, sha256_json
from reproval.folders import model_config
from reproval.records import ModelManifest, RequestType, TaskFacts
from reproval.requests import Tokens, windows
from reproval.seeds import Seed
from reproval.settings import ModelConfig, Unit
from reproval.shards import answer_tokens
from reproval.tasks import built

BLOCK_TOKENS = 16
# One of them comes with every processor; without, there is none to be loaded.
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "chat_template.json")
# All other files of a manifest count as the tokenizer's: vocabulary, merges, chat templates, code.
_NOT_THE_TOKENIZERS = ("*.safetensors", "*.safetensors.index.json", "generation_config.json")


def encoder(folder: str, asked: ModelConfig) -> Any:
    """An lm-eval LM that has a tokenizer and no model; `asked` says how its chat template is to be rendered.

    It encodes as lm-eval's vLLM backend does (special tokens unless the text already starts with BOS), through
    lm-eval's own helpers; importing that backend would import vLLM, which takes longer than the counting.
    """
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import _add_special_kwargs, has_bos_prefix
    from transformers import AutoTokenizer

    class Encoder(TemplateLM):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            # The class that vLLM takes (tokenizer_mode hf): else transformers reads Mistral's own tekken.json.
            self.tokenizer = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=asked.trust_remote_code, mistral_format=False
            )
            # As in lm-eval's vLLM model; None: the tokenizer's default.
            self.hf_chat_template = processor_template(folder, asked.trust_remote_code)

        @property
        def eot_token_id(self) -> int:
            return int(self.tokenizer.eos_token_id)

        @property
        def prefix_token_id(self) -> int:
            bos = self.tokenizer.bos_token_id
            return int(bos if bos is not None else self.tokenizer.eos_token_id)

        @property
        def tokenizer_name(self) -> str:
            return str(self.tokenizer.name_or_path)

        def tok_encode(
            self, string: str | list[str], add_special_tokens: bool | None = None, **_: Any
        ) -> list[int] | list[list[int]]:
            texts = [string] if isinstance(string, str) else string
            bos = self.tokenizer.decode(self.prefix_token_id)
            special = _add_special_kwargs(add_special_tokens, None)
            found: dict[str, list[int]] = {"": []}
            for begun in (False, True):
                if part := [text for text in texts if text and has_bos_prefix(text, bos) == begun]:
                    without = {"add_special_tokens": False} if begun else {}
                    encoded = self.tokenizer(part, return_attention_mask=False, **(special | without))
                    found.update(zip(part, encoded.input_ids, strict=True))
            return found[string] if isinstance(string, str) else [found[text] for text in texts]

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            import jinja2

            def render(history: list[dict[str, str]]) -> str:
                return str(
                    self.tokenizer.apply_chat_template(
                        history,
                        tokenize=False,
                        add_generation_prompt=add_generation_prompt,
                        continue_final_message=not add_generation_prompt,
                        chat_template=self.hf_chat_template,
                        # Templates tell None from absent.
                        enable_thinking=asked.enable_thinking,
                        **(asked.chat_template_args or {}),
                    )
                )

            try:
                return render(chat_history)
            except jinja2.exceptions.TemplateError:
                # Templates without a system role raise; lm-eval then drops it.
                return render([message for message in chat_history if message["role"] != "system"])

        def _loglikelihood_tokens(
            self, requests: Any, disable_tqdm: bool = False, **_: Any
        ) -> list[tuple[float, bool]]:
            raise NotImplementedError("counted from the text alone")

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            raise NotImplementedError("counted from the text alone")

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            raise NotImplementedError("counted from the text alone")

    return Encoder()


def processor_template(folder: str, trust_remote_code: bool) -> str | None:
    """The chat template of a model's processor, which vLLM prefers to the tokenizer's (resolve_chat_template,
    vllm/renderers/hf.py). Like there, a processor that cannot be loaded has none.
    """
    if not any((Path(folder) / name).exists() for name in _PROCESSOR_FILES):
        return None
    from transformers import AutoProcessor, ProcessorMixin

    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception:
        return None
    template = processor.chat_template if isinstance(processor, ProcessorMixin) else None
    return template if isinstance(template, str) else None


def counted_with(manifest: ModelManifest, model: Any, trust_remote_code: bool, environment: str) -> dict[str, Any]:
    """What decides the tokens of a given text. `model` is what `encoder` returns; reads nothing large.

    Of config.json transformers reads the model type, by which it chooses the class that is named here, and the version
    that wrote the file, by which it mends Mistral's (TokenizersBackend._patch_mistral_regex). Code that comes with the
    checkpoint may read all of it. `environment` stands for the versions of transformers and lm-eval.
    """
    config = model_config(Path(manifest.folder))
    others = _NOT_THE_TOKENIZERS if trust_remote_code else (*_NOT_THE_TOKENIZERS, "config.json")
    return {
        "files": {
            entry.path: entry.sha256
            for entry in manifest.files
            if not any(Path(entry.path).match(pattern) for pattern in others)
        },
        "class": type(model.tokenizer).__name__,
        "config": {key: config.get(key) for key in ("model_type", "transformers_version")},
        "trust_remote_code": trust_remote_code,
        "environment": environment,
        # Nobody has to remember to raise a number when the code below counts otherwise.
        "code": [sha256_file(Path(module)) for module in (__file__, encoding.__file__)],
    }


def unit_facts(unit: Unit, seed: Seed, model: Any, counted: Counted | None = None) -> list[TaskFacts]:
    """Facts of every leaf task of a unit. `model` is what `encoder` returns. Raises tasks.TaskError, OSError.

    The requests are always built, as text; with `counted` they are tokenized only if nobody has done it before.
    """
    tasks = built(unit, seed, model)
    hashes = {name: _task_hash(task) for name, task in tasks.items()}
    facts = counted.find(unit, hashes) if counted else None
    if facts is None:
        facts = [_facts(unit, name, task, hashes[name], model) for name, task in tasks.items()]
        if counted:
            counted.keep(unit, hashes, facts)
    return facts


def _facts(unit: Unit, name: str, task: Any, task_hash: str, model: Any) -> TaskFacts:
    # A task makes one kind of request; its instances say which.
    kind: RequestType = task.instances[0].request_type
    return TaskFacts(
        suite=unit.suite,
        unit=unit.task,
        task=name,
        request_type=kind,
        documents=len({instance.doc_id for instance in task.instances}),
        task_hash=task_hash,
        sampled_unasked=kind == "generate_until" and any(sampled_unasked(each.args[1]) for each in task.instances),
        **_lengths(kind, task.instances, model),
    )


def sampled_unasked(generation_kwargs: dict[str, Any]) -> bool:
    """Whether vLLM draws at temperature 1 what lm-eval takes for greedy (`modify_gen_kwargs` of its vLLM model)."""
    return not generation_kwargs.keys() & {"do_sample", "temperature"}


def _lengths(kind: RequestType, instances: list[Any], model: Any) -> dict[str, Any]:
    """The countable fields of TaskFacts, for requests of one kind."""
    lengths: Counter[int] = Counter()
    sums: Counter[str] = Counter()
    largest = 0

    # One pass: the rest is counted while contexts go by, so that no more than a window of them is held.
    def contexts() -> Iterator[Tokens]:
        nonlocal largest
        for instance, context, continuation in _encoded(kind, instances, model):
            repeat = instance.repeats or 1
            new = answer_tokens(instance.args[1]) if kind == "generate_until" else 0
            lengths[len(context) + len(continuation) + new] += repeat
            largest = max(largest, *(int(part.max()) for part in (context, continuation) if len(part)), 0)
            sums.update(
                requests=repeat,
                context_tokens=len(context) * repeat,
                continuation_tokens=len(continuation) * repeat,
                generation_tokens=new * repeat,
                one_token_continuations=repeat if kind == "loglikelihood" and len(continuation) == 1 else 0,
            )
            yield context

    unique = _unique_prefix_tokens(contexts())
    return {
        **sums,
        "longest_request_tokens": max(lengths),
        "lengths": dict(sorted(lengths.items())),
        "unique_prefix_tokens": unique,
        "largest_token": largest,
    }


def _encoded(kind: RequestType, instances: list[Any], model: Any) -> Iterator[tuple[Any, Tokens, Tokens]]:
    """Each request with its context and its continuation, encoded window by window."""
    nothing, prefix = as_tokens([]), as_tokens([model.prefix_token_id])
    for window in windows(instances, TEXTS_AT_ONCE):
        if kind == "loglikelihood":
            pairs = encode_pairs(model, [instance.args for instance in window])
        else:
            texts = encode_texts(model, (instance.args[0] for instance in window))
            tokens = [as_tokens(texts[instance.args[0]]) for instance in window]
            # Every token of a text is scored once; the prefix token is what the first is conditioned on.
            rolling = kind == "loglikelihood_rolling"
            pairs = [(prefix, each) if rolling else (each, nothing) for each in tokens]
        yield from ((instance, *pair) for instance, pair in zip(window, pairs, strict=True))


def _unique_prefix_tokens(contexts: Iterable[Tokens]) -> int:
    """Context tokens that a prefix cache with whole blocks of 16 has to compute: blocks seen before cost nothing."""
    seen: set[int] = set()
    computed = 0
    last: Tokens | None = None
    for context in contexts:
        whole = len(context) - len(context) % BLOCK_TOKENS
        computed += len(context) - whole
        # Choices of one question share the very object.
        if context is last:
            continue
        last = context
        # The running hash stands for the whole prefix up to a block's end, as in vLLM's block hashes.
        prefix = 0
        for begin in range(0, whole, BLOCK_TOKENS):
            prefix = hash((prefix, context[begin : begin + BLOCK_TOKENS].tobytes()))
            if prefix not in seen:
                seen.add(prefix)
                computed += BLOCK_TOKENS
    return computed


def _task_hash(task: Any) -> str:
    """SHA-256 over what the task asks and how it judges: its resolved configuration, the arguments of every request and
    every document, which holds the right answer.

    Functions of a configuration are dumped by lm-eval as their source text; where a dump would hold a memory address
    (`<function f at 0x...>`) or a path, the requests still tell one prompt from another.
    """
    config = {
        key: value
        for key, value in task.dump_config().items()
        if key not in ("metadata", "custom_dataset", "dataset_kwargs")
    }
    config["version"] = str(task.VERSION)
    requests = [
        [instance.request_type, instance.doc_id, instance.idx, instance.arguments] for instance in task.instances
    ]
    documents = {instance.doc_id: instance.doc for instance in task.instances}

    def type_name(value: Any) -> str:
        return type(value).__name__

    texts = [
        json.dumps(config, sort_keys=True, default=type_name),
        json.dumps(requests, default=str),
        json.dumps(list(documents.values()), default=type_name),
    ]
    return sha256_json([sha256_bytes(text.encode()) for text in texts])
