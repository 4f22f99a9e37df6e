"""Computes how likely given answers are to a model, from one prefill of the prompt.

Options are walked as a tree of tokens, so that a common beginning is computed once. Going back to a branch is
`Session.truncate`, which copies nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from trol_edge.answering.asking import Question, Seen, Turn, ask, check_length, prefill
from trol_edge.answering.desk import Desk
from trol_edge.answering.options import Options
from trol_edge.answering.results import Choice, Clock, Option, YesNo
from trol_edge.answering.sampling import log_sum_exp
from trol_edge.answering.turns import Call
from trol_edge.errors import ContextError, UsageError
from trol_edge.numeric import shown
from trol_edge.prompt.template import Prompt
from trol_edge.session import Session

Float32 = NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class Poll:
    """A question to which several answers are weighed: its pictures, as they were read, and the turns before it."""

    prompt: Prompt
    pictures: list[Seen]
    before: Sequence[Turn]
    call: Call
    start: float  # when the call began, by the desk's clock
    ids: list[int] | None = None  # the tokens of all of it, if they are known already


def choose(desk: Desk, poll: Poll, texts: list[str], options: Options) -> Choice:
    """Find which of some answers is likeliest (see trol_edge.Runtime.choose)."""
    logprobs, tokens, clock = _score(desk, poll, texts, options, whole=True)
    scores = [logprob / count for logprob, count in zip(logprobs, tokens, strict=True)]
    found = tuple(map(Option, texts, softmax(scores), scores, logprobs, tokens))
    best = max(range(len(found)), key=lambda i: found[i].score)
    return Choice(texts[best], best, found[best].probability, found, clock.timings)


def yes_no(desk: Desk, poll: Poll, options: Options) -> YesNo:
    """Find whether the answer begins with yes rather than no (see trol_edge.Runtime.yes_no)."""
    logprobs, _, clock = _score(desk, poll, ["Yes", "yes", "No", "no"], options, whole=False)
    shares = softmax(logprobs)
    yes = shares[0] + shares[1]
    return YesNo(yes >= 0.5, yes, clock.timings)


def _score(
    desk: Desk, poll: Poll, texts: list[str], options: Options, whole: bool
) -> tuple[list[float], list[int], Clock]:
    """Log-probability and token count of each text as the answer. whole: count the end of the answer as a token."""
    call = poll.call
    question = ask(desk, poll.prompt, poll.pictures, call, poll.before, poll.ids)
    answers = [_answer_ids(desk, poll, question, text) for text in texts]
    context, longest = desk.model.bundle.manifest.context, max(map(len, answers))
    if len(question.ids) + longest > context:
        raise ContextError(
            f"prompt and pictures take {len(question.ids)} tokens and the longest option {longest}, but this bundle "
            f"holds {context}; shorten them, give fewer pictures, or export with a larger --context"
        )
    ends = desk.model.ends if whole else frozenset[int]()
    clock = Clock(1e3 * (desk.now() - poll.start))

    def work(session: Session) -> list[float]:
        logits = prefill(desk, session, question, options, call, clock)
        since = desk.now()
        logprobs = answer_logprobs(session, logits, answers, ends, call.check)
        clock.decode_ms = 1e3 * (desk.now() - since)
        return logprobs

    logprobs = desk.held(call, options.session, clock, work)
    return logprobs, [len(answer) + whole for answer in answers], clock


def _answer_ids(desk: Desk, poll: Poll, question: Question, text: str) -> list[int]:
    poll.call.check()
    check_length(desk, text, f"option {shown(text)}")
    tiles, before = [picture.tiles for picture in poll.pictures], [turn.spoken for turn in poll.before]
    ids = desk.model.tokenize(poll.prompt, tiles, text, before)
    prompt = len(question.ids)
    if ids[:prompt] != question.ids or len(ids) == prompt:
        raise UsageError(f"option {shown(text)} has no tokens of its own after the prompt; word it differently")
    return ids[prompt:]


def checked_options(options: Sequence[str]) -> list[str]:
    """Return the options. Raises UsageError if a choice between them would have no meaning."""
    if isinstance(options, str) or not isinstance(options, (list, tuple)) or len(options) < 2:
        raise UsageError(f"options should be a list of two or more texts, found {shown(options)}")
    seen: dict[str, int] = {}
    for i, option in enumerate(options):
        if not isinstance(option, str) or not option.strip():
            raise UsageError(f"option {i} is {shown(option)}; every option needs text")
        if option != option.strip():
            raise UsageError(f"option {i} is {shown(option)}; leave out the white space around it")
        if (first := seen.setdefault(option, i)) != i:
            raise UsageError(f"option {shown(option)} occurs twice (items {first} and {i})")
    return list(options)


def answer_logprobs(
    session: Session,
    logits: Float32,
    answers: Sequence[Sequence[int]],
    ends: Collection[int],
    check: Callable[[], None],
) -> list[float]:
    """The natural logarithm of the probability of each answer (token ids), given the prompt that `session` holds.

    logits: float32 [V] after the prompt. ends: ids that end an answer. Their probability after the last token counts,
    which distinguishes "left" from the beginning of "left door". If empty, the answers are beginnings and may continue
    in any way. check is called before each step, and its exceptions pass through.
    Afterwards the session holds the prompt, and perhaps tokens after it.
    """
    prompt = session.length
    end_ids = np.fromiter(ends, np.int64)
    totals = [0.0] * len(answers)
    branches = [(list[int](), list(range(len(answers))))]  # (beginning, the answers that have it), depth first
    while branches:
        path, members = branches.pop()
        if path:
            check()
            session.truncate(prompt + len(path) - 1)  # the rest is this branch's beginning, which siblings share
            logits = session.step_view(path[-1])
        normaliser = log_sum_exp(logits)
        followers: dict[int, list[int]] = {}
        for i in members:
            if len(answers[i]) == len(path):
                totals[i] += log_sum_exp(logits[end_ids]) - normaliser if len(end_ids) else 0.0
            else:
                followers.setdefault(answers[i][len(path)], []).append(i)
        for token, group in followers.items():
            for i in group:
                totals[i] += float(logits[token]) - normaliser
            if len(end_ids) or max(len(answers[i]) for i in group) > len(path) + 1:
                branches.append(([*path, token], group))
    return totals


def softmax(scores: Sequence[float]) -> list[float]:
    """Turn scores that are logarithms into probabilities that sum to 1."""
    most = max(scores)
    shares = [math.exp(score - most) for score in scores]
    return [share / sum(shares) for share in shares]
