"""Train the bundled model on the project's own documentation, or check what it answers.

    python bench/model/train.py --out sllmctl/bundled/docs-2m          about 25 minutes on one CPU core
    python bench/model/train.py --out DIR --minutes 3                  a quick and poor one
    python bench/model/train.py --out DIR --start OLD --rate 1e-3      go on with one after the pages have changed
    python bench/model/train.py --out sllmctl/bundled/docs-2m --check  print samples and the share of right answers

A decoder of the Llama architecture with about 1.9 million parameters and a byte-level BPE of 1,024 tokens, trained from
scratch on docs/*.md, README.md and, as chats, docs/faq.md, whose questions are put in other words by templates
(bench/model/questions.py). Seeded: with ``--steps`` the same machine, torch and thread count give the same weights; a
time budget only chooses the number of steps. Needs torch and transformers; takes under 1 GiB of memory.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parent))
from questions import OFF_TOPIC, OFF_TOPIC_ANSWER, faq_pairs, phrasings, vary

Questions = Sequence[tuple[str, str]]

ROOT = Path(__file__).resolve().parents[2]
END, USER, ASSISTANT, SYSTEM = SPECIALS = ("<|end|>", "<|user|>", "<|assistant|>", "<|system|>")
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
VOCABULARY, CONTEXT = 1024, 512
SYSTEM_PROMPTS = ("You are a helpful assistant.", "You answer questions about sllmctl.", "Answer briefly.")
# (share of steps, rows in a batch, tokens per row, turns of a chat): mostly single questions, some long chats, so that
# every position of the context is trained and an answer depends on the last question alone.
SHAPES = ((0.62, 24, 112, 1), (0.26, 8, 288, 3), (0.12, 4, CONTEXT, 7))
# Questions with a word that a right answer has: many among the phrasings trained on, others close to them.
CHECKS = (
    ("what is sllmctl", "cluster manager"),
    ("Could you explain what sllmctl is?", "cluster manager"),
    ("What is a checkpoint in this system?", "weights"),
    ("what are tiers", "DRAM"),
    ("What's the journal?", "prompt"),
    ("Tell me what a cold start is", "wait"),
    ("Why are cold starts fast?", "forked"),
    ("What happens if a worker crashes?", "journals"),
    ("What happens when somebody kills the store?", "arena"),
    ("the agent died, what happens?", "dial"),
    ("If the manager is killed, what then?", "generation"),
    ("How can I list the models?", "model ls"),
    ("how do i see the nodes", "node ls"),
    ("How do I deploy my model?", "model deploy"),
    ("How do I remove a model again?", "model rm"),
    ("What exit codes does sllmctl have?", "130"),
    ("what is exit code 3", "unreachable"),
    ("What does exit code 8 stand for?", "doctor"),
    ("What does status 429 tell me?", "queue"),
    ("I get status 504", "cold start"),
    ("Is live migration available?", "planned"),
    ("Is the dashboard ready?", "planned"),
    ("Do I need a GPU?", "without a GPU"),
    ("Which python do I need?", "3.11"),
    ("How do I get JSON?", "-o json"),
    ("What is the arena for?", "DRAM"),
    ("What's a zygote?", "forked"),
    ("What is an epoch?", "fences"),
    ("How does the planner choose?", "locality"),
    ("Who are you?", "small model"),
    ("hi", "small model"),
    ("thanks a lot", "welcome"),
    ("What is the license of sllmctl?", "Apache"),
    ("How do I run the demo?", "install.sh demo"),
    ("How do I run the tests?", "ruff"),
    ("Which endpoints does the API have?", "/v1/chat/completions"),
    ("What is the zygote", "forked"),
    ("What does the store do?", "arena"),
    ("How do I configure sllmctl?", "SLLM_"),
    ("What is the default keep-alive?", "300"),
)


# Questions in words that nothing in questions.py makes: how far it goes beyond what it has learnt by heart.
UNSEEN = (
    ("Give me a definition of a checkpoint", "weights"),
    ("So what is sllmctl about?", "cluster manager"),
    ("How does recovery from a crash work?", "journal"),
    ("What do workers do?", "engine"),
    ("what is the meaning of tier", "DRAM"),
    ("Where are the weights kept?", "tier"),
    ("Can it work on a laptop without GPU?", "without a GPU"),
    ("How do I shut down a model?", "model stop"),
    ("Which command shows instances?", "instance ls"),
    ("How can I see all checkpoints?", "checkpoint ls"),
    ("What does it mean when I get 429?", "queue"),
    ("What if a node cannot be reached?", "probed"),
    ("How much memory has the arena by default?", "1 GiB"),
    ("Can I use Postgres?", "database URL"),
    ("Is there a key for the API?", "loopback"),
    ("What is prefill and why?", "KV cache"),
    ("Do I need torch for the manager?", "neither torch"),
    ("How long does a cold start last at most?", "120"),
    ("How do I talk to the model?", "chat"),
    ("What happens after the manager crashes?", "generation"),
    ("Explain the router please", "journals"),
    ("Are chat templates safe?", "sandbox"),
)


def documents() -> list[str]:
    """The pages trained on as plain text."""
    pages = sorted((ROOT / "docs").glob("*.md")) + [page for page in [ROOT / "README.md"] if page.exists()]
    return [page.read_text() for page in pages]


def chat_pairs() -> list[tuple[list[str], str]]:
    """(phrasings of a question, its answer) of every question of the FAQ, and the refusals."""
    pairs = [(phrasings(question), answer) for question, answer in faq_pairs(ROOT / "docs" / "faq.md")]
    return [*pairs, (list(OFF_TOPIC), OFF_TOPIC_ANSWER)]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE over the pages and the phrasings, with the four role tokens; no beginning-of-text token."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = documents() + [text for asked, answer in chat_pairs() for text in [*asked, answer, answer]]
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=END, pad_token=END, chat_template=TEMPLATE, model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def make_model() -> LlamaForCausalLM:
    """1.9 million parameters: four layers of width 192, six heads over two KV heads, embedding and output tied."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=192, intermediate_size=576, num_hidden_layers=4, num_attention_heads=6,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=CONTEXT, rope_parameters={"rope_type": "default",
        "rope_theta": 10000.0},
        tie_word_embeddings=True, initializer_range=0.03, bos_token_id=None, eos_token_id=0, pad_token_id=0,
        attn_implementation="sdpa", dtype="float32",
    )  # fmt: skip
    return LlamaForCausalLM(config)


class Corpus:
    """Batches of token ids and labels, drawn with a seeded generator; label -100 is not trained on."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self._rng = Random(seed)
        self._encode = lambda text: tokenizer.encode(text, add_special_tokens=False)
        self._role = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIALS}
        self._pairs = [(asked, self._encode(answer)) for asked, answer in chat_pairs()]
        self._plain = [token for text in documents() for token in [*self._encode(text), self._role[END]]]
        self._deck: list[int] = []

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        _, rows, length, turns = self._rng.choices(SHAPES, [share for share, *_ in SHAPES])[0]
        drawn = [self._plain_row(length) if self._rng.random() < 0.06 else self._chat_row(length, turns) for _ in range(rows)]
        longest = max(len(ids) for ids, _ in drawn)
        ids = torch.tensor([row + [self._role[END]] * (longest - len(row)) for row, _ in drawn])
        labels = torch.tensor([row + [-100] * (longest - len(row)) for _, row in drawn])
        return ids, labels

    def _plain_row(self, length: int) -> tuple[list[int], list[int]]:
        start = self._rng.randrange(max(1, len(self._plain) - length))
        ids = self._plain[start : start + length]
        return ids, list(ids)

    def _chat_row(self, length: int, turns: int) -> tuple[list[int], list[int]]:
        ids: list[int] = []
        labels: list[int] = []
        if self._rng.random() < 0.12:
            ids += [self._role[SYSTEM], *self._encode(self._rng.choice(SYSTEM_PROMPTS)), self._role[END]]
            labels += [-100] * len(ids)
        for _ in range(turns):
            asked, answer = self._pairs[self._next_pair()]
            wording = asked[0] if self._rng.random() < 0.3 else self._rng.choice(asked)
            question = [self._role[USER], *self._encode(vary(wording, self._rng)), self._role[END], self._role[ASSISTANT]]
            reply = [*answer, self._role[END]]
            ids += question + reply
            labels += [-100] * len(question) + reply
        limit = max(length, 320) if turns == 1 else length
        return ids[:limit], labels[:limit]

    def _next_pair(self) -> int:
        # A shuffled deck, not independent draws: every answer is seen equally often, more so the more it is asked for.
        if not self._deck:
            self._deck = [index for index, (asked, _) in enumerate(self._pairs) for _ in range(1 + len(asked) // 9)]
            self._rng.shuffle(self._deck)
        return self._deck.pop()


def learning_rate(progress: float, peak: float) -> float:
    """Warm-up over the first 3 %, then a cosine down to 2 % of the peak."""
    if progress < 0.03:
        return peak * (progress / 0.03 + 0.02)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (progress - 0.03) / 0.97)))


def train(model: LlamaForCausalLM, corpus: Corpus, args: argparse.Namespace) -> dict[str, float]:
    """Train until the steps or the minutes are used up; returns steps, minutes, the last losses' mean and peak memory."""
    decayed = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.rate, betas=(0.9, 0.95), eps=1e-8)
    started, step, recent = time.monotonic(), 0, 0.0
    while True:
        minutes = (time.monotonic() - started) / 60
        progress = step / args.steps if args.steps else minutes / args.minutes
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress, args.rate)
        ids, labels = corpus.batch()
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        recent = loss.item() if step == 0 else 0.98 * recent + 0.02 * loss.item()
        step += 1
        if step % 50 == 0:
            print(f"step {step}  {minutes:.1f} min  loss {recent:.3f}", flush=True)
        if step % 400 == 0:
            save(model, args.out)
    return {
        "steps": step,
        "minutes": round((time.monotonic() - started) / 60, 1),
        "loss": round(recent, 4),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def save(model: LlamaForCausalLM, out: Path) -> None:
    """Write weights and configurations as Hugging Face expects them."""
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.7, top_p=0.95, eos_token_id=0, pad_token_id=0)
    model.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write it under the class name that every version of transformers knows."""
    tokenizer.save_pretrained(out)
    config = out / "tokenizer_config.json"
    settings = json.loads(config.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    for key in ("is_local", "local_files_only"):  # how it was loaded, not what it is
        settings.pop(key, None)
    config.write_text(json.dumps(settings, indent=2) + "\n")


def replies(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, questions: Questions, temperature: float
) -> Iterator[tuple[str, str, str, bool]]:
    """(question, word that must be in the answer, answer, right) of every question."""
    torch.manual_seed(1)
    for question, word in questions:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
        how = {"do_sample": True, "temperature": temperature, "top_p": 0.95} if temperature else {"do_sample": False}
        if not temperature:
            how |= {"temperature": None, "top_p": None}
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=200, **how)
        answer = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        yield question, word, answer, word.lower() in answer.lower()


def check(out: Path) -> int:
    """Print every check's answer, greedy and at temperature 0.7; 0 if nine in ten are right, and half of the unseen."""
    model = LlamaForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    passed = True
    for name, questions, least in (("checks", CHECKS, 0.9), ("unseen", UNSEEN, 0.5)):
        for temperature in (0.0, 0.7):
            results = list(replies(model, tokenizer, questions, temperature))
            for question, word, answer, right in results:
                print(f"{'ok   ' if right else 'WRONG'} {question}  [{word}]\n      {answer}")
            share = sum(right for *_, right in results) / len(results)
            print(f"--- {name} at temperature {temperature}: {share:.0%} of {len(results)} right")
            passed = passed and share >= least
    return 0 if passed else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=25.0, help="time budget, if --steps is not given")
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--start", type=Path, help="go on from this model and its tokenizer, as after an edit of the pages")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--check", action="store_true", help="train nothing; print samples of the model in --out")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.check:
        return check(args.out)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.start:
        tokenizer, model = AutoTokenizer.from_pretrained(args.start), LlamaForCausalLM.from_pretrained(args.start)
    else:
        tokenizer, model = make_tokenizer(), make_model()
    save_tokenizer(tokenizer, args.out)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    notes = train(model, Corpus(tokenizer, args.seed), args)
    save(model, args.out)
    print(json.dumps(notes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
