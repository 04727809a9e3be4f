"""lm-evaluation-harness on our models: `DtrLM` is an `lm_eval.api.model.LM` over a backbone or a hybrid in memory.

    lm_eval.simple_evaluate(model=DtrLM(model, tokenizer), tasks=["arc_easy"])

Importing this module imports lm_eval (seconds): import it where it is used. Tokenisation follows lm_eval's own HFLM;
the arithmetic is that of `scoring`, so shared prefixes and equal inputs are run once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from dtr_deploy.errors import UsageError
from dtr_deploy.tasks.base import ForwardHidden
from dtr_deploy.tasks.generation import Drafts, Stop, checked_tokens
from dtr_deploy.tasks.requests import Request
from dtr_deploy.tasks.scoring import BATCH_TOKENS, RequestScores, hidden_states, plan_batches, read_requests

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_NEW_TOKENS = 256


class RequestEncoder:
    """Texts of lm-eval instances -> `Request`s, with lm-eval's rules for borders, empty contexts and long inputs.

    max_length: tokens a model reads at most; longer inputs lose their beginning. None = no limit.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context: the beginning-of-text token, else the end-of-text token."""
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return token
        raise UsageError("lm_eval: the tokenizer has neither a bos nor an eos token to start a text with")

    def encode(self, text: str, add_special_tokens: bool | None = None) -> list[int]:
        """Tokens of `text`; the tokenizer's own special tokens, but never a second bos."""
        if add_special_tokens is None:
            add_special_tokens = not text.startswith(str(self.tokenizer.decode([self.prefix_token_id])))
        return self.tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]

    def cut(self, context: list[int], continuation: list[int]) -> Request:
        """A request whose inputs fit into `max_length`."""
        if self.max_length is not None:
            if len(continuation) > self.max_length:
                raise UsageError(
                    f"lm_eval: an answer of {len(continuation)} tokens exceeds a context of {self.max_length}"
                )
            context = context[-(self.max_length + 1 - len(continuation)) :]
        return Request(tuple(context), tuple(continuation))

    def windows(self, text: str) -> list[Request]:
        """Requests that together predict every token of `text` once, each from as much context as fits."""
        tokens = self.encode(text)
        limit = self.max_length or max(1, len(tokens))
        windows = get_rolling_token_windows(tokens, self.prefix_token_id, max_seq_len=limit, context_len=1)
        return [self.cut(*make_disjoint_window(window)) for window in windows]


class DtrLM(TemplateLM):
    """All three request kinds of lm-eval for a causal language model and its tokenizer.

    max_length: default the model's `max_position_embeddings`. forward_hidden: see `dtr_deploy.tasks.base`; used for
    log-likelihoods in place of the model's own forward. drafts: what earlier models wrote after the same contexts; a
    greedy answer that has one is checked in one pass instead of decoded token by token, and what this model writes
    takes its place. The answers are the same.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int | None = None,
        batch_tokens: int = BATCH_TOKENS,
        forward_hidden: ForwardHidden | None = None,
        drafts: Drafts | None = None,
    ) -> None:
        super().__init__()
        self._drafts = drafts
        self.model = model
        self.tokenizer = tokenizer
        self._device = model.device
        self._batch_tokens = batch_tokens
        self._forward_hidden = forward_hidden
        self.max_length = max_length or model.config.max_position_embeddings
        self._encoder = RequestEncoder(tokenizer, self.max_length)

    @property
    def eot_token_id(self) -> int:
        """End-of-text token."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """See `RequestEncoder.prefix_token_id`."""
        return self._encoder.prefix_token_id

    @property
    def tokenizer_name(self) -> str:
        """Names lm-eval's request cache."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokens of `string`."""
        return self._encoder.encode(string, add_special_tokens)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The tokenizer's chat template over `chat_history`."""
        text = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return str(text)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        scores = self._run([self._encoder.cut(context, continuation) for _, context, continuation in requests])
        results = [(float(value), bool(hit)) for value, hit in zip(scores.log_probs, scores.greedy, strict=True)]
        for (texts, _, _), result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, result)
        return results

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text, nats."""
        windows = [self._encoder.windows(instance.args[0]) for instance in requests]
        flat = [request for group in windows for request in group]
        values = iter(self._run(flat).log_probs.tolist() if flat else ())
        results = [sum(next(values) for _ in group) for group in windows]
        for instance, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", instance.args, result)
        return results

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuation of each context up to its first stop text (which is cut off) or `max_gen_toks` tokens."""
        encoded = [self.tok_encode(instance.args[0]) for instance in requests]
        # Rows of a batch share their generation settings; similar lengths keep padding and idle steps few.
        order = sorted(range(len(requests)), key=lambda i: (repr(requests[i].args[1]), -len(encoded[i]), i))
        results = [""] * len(requests)
        batch: list[int] = []
        for place, index in enumerate(order):
            batch.append(index)
            following = order[place + 1] if place + 1 < len(order) else None
            widest = max(len(encoded[i]) for i in batch)
            if (
                following is None
                or requests[following].args[1] != requests[index].args[1]
                or (len(batch) + 1) * widest > self._batch_tokens
            ):
                texts = self._generate([encoded[i] for i in batch], requests[index].args[1])
                for i, text in zip(batch, texts, strict=True):
                    results[i] = text
                    self.cache_hook.add_partial("generate_until", requests[i].args, text)
                batch = []
        return results

    def _run(self, requests: list[Request]) -> RequestScores:
        pad = self.tokenizer.pad_token_id
        batches = plan_batches(requests, pad if pad is not None else 0, self._batch_tokens)
        hidden = hidden_states(self.model, batches, self._forward_hidden)
        return read_requests(batches, hidden, self.model.get_output_embeddings(), len(requests))

    @torch.no_grad()
    def _generate(self, contexts: list[list[int]], settings: dict[str, Any]) -> list[str]:
        options: dict[str, Any] = dict(normalize_gen_kwargs(settings, DEFAULT_NEW_TOKENS))
        eos = self.tokenizer.decode([self.eot_token_id])
        stops = [stop for stop in handle_stop_sequences(options.pop("until", None), eos=eos) if stop]
        new_tokens = options.pop("max_gen_toks")
        room = self.max_length - new_tokens
        if room < 1:
            raise UsageError(f"lm_eval: {new_tokens} new tokens leave no room in the model's context {self.max_length}")
        if not options.get("do_sample"):
            # Settings of sampling mean nothing to greedy decoding, and transformers warns about each.
            for key in ("temperature", "top_p", "top_k"):
                options.pop(key, None)
        contexts = [context[-room:] for context in contexts]
        if self._drafts is None or any(options.values()):  # settings beyond greedy decoding
            rows = self._decode(contexts, new_tokens, stops, options)
        else:
            stop = Stop.of(self.model, self.tokenizer, stops, new_tokens)
            rows = checked_tokens(self.model, contexts, stop, self._drafts, self._batch_tokens)
        texts = []
        for row in rows:
            # A finished row is padded while the others go on; pad may be a printable token.
            end = row.index(self.eot_token_id) if self.eot_token_id in row else len(row)
            text = self.tokenizer.decode(row[:end], skip_special_tokens=True)
            texts.append(postprocess_generated_text(text, stops, think_end_token=None))
        return texts

    def _decode(
        self, contexts: list[list[int]], new_tokens: int, stops: list[str], options: dict[str, Any]
    ) -> list[list[int]]:
        """New tokens of each row, padded behind its end."""
        width = max(len(context) for context in contexts)
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.eot_token_id
        ids = torch.tensor([[pad] * (width - len(context)) + context for context in contexts])
        mask = torch.tensor([[0] * (width - len(context)) + [1] * len(context) for context in contexts])
        output = self.model.generate(
            input_ids=ids.to(self.model.device),
            attention_mask=mask.to(self.model.device),
            max_new_tokens=new_tokens,
            pad_token_id=pad,
            stop_strings=stops,
            tokenizer=self.tokenizer,
            **options,
        )
        return output[:, width:].tolist()
