"""MMA-Diffusion, its attack on the text (Yang et al., 2024). https://arxiv.org/abs/2311.17516

It searches for tokens without banned words whose text embedding is close to that of a target sentence:

    max_{tokens} cos( pool(tau(tokens)), pool(tau(P)) ),   pool: the state at the end of the text.

Greedy coordinate gradient (GCG; Zou et al., 2023, arXiv:2307.15043): for each place, the gradient with respect to
one-hot tokens selects the `top` best replacements. Each iteration evaluates `candidates` prompts with one random
replacement, and continues with the best. The search starts from random letters. Its result is the most similar prompt
of all iterations.

Banned words are the concept's name, its synonyms, and `banned` (the authors ban words for nudity). A prompt must not
contain one of them: not as a token, not across several tokens, not within another word.

The defaults are the paper's. The paper has `count` prompts for each target; here the images of a target use them in
turn. With `transfer`, the search runs on the unedited model, because the paper attacks models without access to them.

Deviations: the tokenizer has to turn a candidate's text into the same tokens, where the authors' code compares only
their number. The code's stop at a similarity of 0.9, and its mean over all states of a T5, are left out. Tokens that
are no text by themselves are not used. With several text encoders, the attack uses the one whose states come first.
"""

# S searches, C candidates of each, K tokens of each, V tokens of the encoder, W width of the states.
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import cycle
from string import ascii_lowercase
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from unlearning.attacks.base import Access, Attack
from unlearning.concepts import UnlearningTask
from unlearning.config.values import Count
from unlearning.errors import UserError
from unlearning.models.diffusion import DiffusionModel
from unlearning.sampling.attack_result import AttackedPrompt, AttackResult
from unlearning.sampling.tokens import FreeTokens
from unlearning.store.loops import resumed
from unlearning.store.manifest import ManifestRow

DRAWS = 100  # random starts for each search, of which the first without a banned word is used
AT_ONCE = 2**13, 2**27  # limits of one backward pass: tokens, and entries of their one-hot gradient


Targets = Mapping[str, Tensor]  # pool(tau(P)) by prompt, (W,)


class MMA(Attack):
    """Searches prompts without banned words, by greedy coordinate gradient.

    Args:
        banned: Banned words, besides names and synonyms of the erased concepts.
        tokens: K.
        count: Prompts for each target, but no more than it has images.
        iterations: Replacements.
        candidates: Prompts that each iteration evaluates.
        top: For each place, the number of tokens from which a replacement is drawn.
        transfer: Whether the search runs on the unedited model.
    """

    def __init__(
        self,
        *,
        banned: tuple[str, ...] = (),
        tokens: Count = 20,
        count: Count = 10,
        iterations: Count = 1000,
        candidates: Count = 512,
        top: Count = 256,
        transfer: bool = True,
    ):
        self.banned, self.tokens, self.count = banned, tokens, count
        self.iterations, self.candidates, self.top = iterations, candidates, top
        self.transfer = transfer
        self.access: Access = "black" if transfer else "text encoder"

    def observe(
        self, model: DiffusionModel, task: UnlearningTask, rows: Sequence[ManifestRow]
    ) -> Targets | AttackResult:
        """The targets' embeddings; with `transfer`, the result of the search."""
        free, prompts = FreeTokens.of(model, self.tokens), list(dict.fromkeys(row.prompt for row in rows))
        states = model.text_states(model.encode_prompts(prompts))[free.encoder].float()
        ends = (model.last_token(prompts, free.encoder) + 1).clamp(max=states.shape[1] - 1)
        targets = dict(zip(prompts, states[torch.arange(len(prompts)), ends], strict=True))
        return self.find(model, task, rows, targets) if self.transfer else targets

    def find(
        self, model: DiffusionModel, task: UnlearningTask, rows: Sequence[ManifestRow], observed: Targets
    ) -> AttackResult:
        attacked = self._attacked(FreeTokens.of(model, self.tokens), task, rows, observed)
        record = {name: getattr(self, name) for name in ("tokens", "iterations", "candidates", "top", "transfer")}
        return AttackResult(tuple(attacked), {**record, "banned": self._banned(task)})

    def _banned(self, task: UnlearningTask) -> list[str]:
        return [word.casefold() for word in (*self.banned, *(w for c in task.erase for w in c.words)) if word.strip()]

    def _attacked(
        self, free: FreeTokens, task: UnlearningTask, rows: Sequence[ManifestRow], targets: Targets
    ) -> list[AttackedPrompt]:
        """A prompt for each image."""
        images = Counter(row.prompt for row in rows)
        counts = {prompt: min(self.count, images[prompt]) for prompt in targets}
        goals = torch.stack([targets[prompt] for prompt, count in counts.items() for _ in range(count)])
        ids, similarities = self._search(free, goals, self._banned(task))
        texts, course = iter(map(free.text, ids)), iter(similarities.T.tolist())
        turns = {prompt: cycle([(next(texts), next(course)) for _ in range(n)]) for prompt, n in counts.items()}
        pairs = ((row, next(turns[row.prompt])) for row in rows)
        return [AttackedPrompt(row.prompt, text, row.seed, record={"similarities": own}) for row, (text, own) in pairs]

    def _search(self, free: FreeTokens, goals: Tensor, banned: Sequence[str]) -> tuple[Tensor, Tensor]:
        """The tokens most similar to each goal (S, W), (S, K), and the similarity so far in some iterations, (G, S)."""
        end = free.end

        def similar(ids: Tensor) -> Tensor:
            """(S, C) of ids (S, C, K)."""
            each = ids.shape[1]

            def score(states: Tensor, rows: Tensor) -> Tensor:
                return F.cosine_similarity(states[:, end], goals[rows // each])

            return free.scores(ids.flatten(0, 1), score).unflatten(0, ids.shape[:2])

        def best_of(candidates: Tensor, order: Tensor, now: Tensor) -> Tensor:
            """The first candidate that is new, keeps its tokens as text, and has no banned word; or `now`."""
            tried = (candidates[i] for i in order.tolist())
            good = (c for c in tried if not c.equal(now) and free.is_read_back(c) and not _holds(free.text(c), banned))
            return next(good, now)

        usable = [i for i in free.usable.tolist() if not _holds(free.texts[i], banned)]
        ids = self._start(free, usable, len(goals), banned)
        allowed = torch.isin(torch.arange(len(free.embeds), device=ids.device), torch.tensor(usable, device=ids.device))
        now = SimpleNamespace(ids=ids, best=ids, highest=similar(ids[:, None])[:, 0])
        now.course = [now.highest.cpu()]
        for i in resumed(range(self.iterations), "searching", now):
            candidates = self._candidates(now.ids, self._replacements(free, now.ids, goals, allowed))
            orders = similar(candidates).argsort(1, descending=True)
            now.ids = torch.stack([best_of(*own) for own in zip(candidates, orders, now.ids, strict=True)])
            reached = similar(now.ids[:, None])[:, 0]
            now.best = torch.where((reached > now.highest)[:, None], now.ids, now.best)
            now.highest = reached.maximum(now.highest)
            if i % max(1, self.iterations // 10) == 0 or i == self.iterations - 1:
                now.course.append(now.highest.cpu())
        return now.best, torch.stack(now.course)

    def _start(self, free: FreeTokens, usable: Sequence[int], count: int, banned: Sequence[str]) -> Tensor:
        """Random letters (S, K): tokens that begin a word, if the encoder has them as single letters."""
        letters = [i for i in usable if len(text := free.texts[i].strip()) == 1 and text in ascii_lowercase]
        letters = [i for i in letters if free.texts[i] != free.texts[i].strip()] or letters
        if letters:
            tokens = torch.tensor(letters, device=free.usable.device)
            drawn = [tokens[torch.randint(len(letters), (self.tokens,))] for _ in range(count * DRAWS)]
            clean = [ids for ids in drawn if not _holds(free.text(ids), banned)]
            if len(clean) >= count:
                return torch.stack(clean[:count])
        raise UserError(f"No prompt of {self.tokens} letters is without the banned words {', '.join(banned)}.")

    def _replacements(self, free: FreeTokens, ids: Tensor, goals: Tensor, allowed: Tensor) -> Tensor:
        """The allowed tokens (V,) bool with the largest gradient at each place, (S, K, top)."""
        some, end = max(1, min(AT_ONCE[0] // free.length, AT_ONCE[1] // (self.tokens * len(allowed)))), free.end
        top = min(self.top, int(allowed.sum()))
        best = []
        for few, goal in zip(ids.split(some), goals.split(some), strict=True):
            with torch.enable_grad():
                v = free.embeds[few].requires_grad_()
                similarity = F.cosine_similarity(free.states(v)[:, end], goal)
                [gradient] = torch.autograd.grad(similarity.sum(), v)
            gain = gradient @ free.embeds.T  # of one-hot tokens, (S, K, V)
            best.append(gain.masked_fill(~allowed, -torch.inf).topk(top, 2).indices)
        return torch.cat(best)

    def _candidates(self, ids: Tensor, replacements: Tensor) -> Tensor:
        """Prompts with one replacement, (S, C, K): the places in turn, the token at random."""
        count, top = len(ids), replacements.shape[2]
        place = torch.arange(self.candidates, device=ids.device) * self.tokens // self.candidates
        drawn = torch.randint(top, (count, self.candidates, 1)).to(ids.device)
        token = replacements[:, place].gather(2, drawn)
        return ids[:, None].repeat(1, self.candidates, 1).scatter(2, place[:, None].expand_as(token), token)


def _holds(text: str, banned: Sequence[str]) -> bool:
    return any(word in text.casefold() for word in banned)
