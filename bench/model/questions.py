"""Chat pairs for the bundled model: the questions of docs/faq.md, put in other words by simple templates.

Everything here is deterministic for a given ``random.Random``.
"""

from __future__ import annotations

import re
from pathlib import Path
from random import Random

__all__ = ["OFF_TOPIC", "OFF_TOPIC_ANSWER", "faq_pairs", "phrasings", "vary"]

OFF_TOPIC_ANSWER = "I do not know that. I was trained on the documentation of sllmctl, and I know nothing else."

OFF_TOPIC = (
    "What is the capital of France?", "What is 2 + 2?", "Tell me a joke.", "Write a poem about the sea.",
    "Who is the president?",
    "What is the weather today?", "How do I cook rice?", "Translate this to German.", "What is the meaning of life?",
    "Who won the game?", "How old are you?", "Write a Python function.", "What is the biggest planet?", "Sing a song.",
    "Tell me a story.", "Where is Berlin?", "What time is it?", "Do you like music?", "What is a dog?", "Count to ten.",
    "Why is the sky blue?", "How far is the moon?", "Recommend a film.", "What should I eat?", "Say something.",
    "Once upon a time", "Who wrote Hamlet?", "What is the speed of light?", "Give me a recipe.", "Solve this equation.",
)  # fmt: skip

_TEMPLATES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        r"What happens when (?P<x>.+) is killed\?",
        ("What if {x} dies?", "What happens if {x} crashes?", "What happens if I kill {x}?", "{x} was killed, what now?",
         "What happens after kill -9 of {x}?", "What happens when {x} dies?", "Does it survive the death of {x}?"),
    ),
    (r"What happens (?:when|if|to) (?P<x>.+)\?", ("What if {x}?", "Tell me what happens when {x}.", "{x}: what happens?")),
    (r"What if (?P<x>.+)\?", ("What happens if {x}?", "What happens when {x}?")),
    (
        r"What does (?P<x>(?:exit code|status) \d+) mean\?",
        ("What is {x}?", "Why do I get {x}?", "I got {x}.", "Explain {x}.", "{x}?", "Meaning of {x}?",
         "It ended with {x}. Why?"),
    ),
    (r"What does (?P<x>.+) mean(?: here)?\?", ("What is {x}?", "Explain {x}.", "What is the meaning of {x}?", "Define {x}.")),
    (
        r"What does (?P<x>.+) do\?",
        ("What is {x} for?", "What is the job of {x}?", "Tell me what {x} does.", "Explain what {x} does.",
         "What is the role of {x}?",
         "Why is there {x}?", "What is {x}?"),
    ),
    (
        r"What is (?P<a>an?|the) (?P<x>.+)\?",
        ("What's {a} {x}?", "Explain {a} {x}.", "Define {x}.", "Tell me about {a} {x}.", "What does {x} mean?",
         "Describe {a} {x}.",
         "{a} {x}?", "Can you explain {a} {x}?", "What exactly is {a} {x}?", "What are {x}s?", "Tell me about {x}s.",
         "What is {x}?",
         "Explain {x}s.", "What's the {x}?"),
    ),
    (
        r"What (?:is|are) (?P<x>.+)\?",
        ("What's {x}?", "Explain {x}.", "Define {x}.", "Tell me about {x}.", "What does {x} mean?", "Describe {x}.", "{x}?",
         "Can you explain {x}?", "What exactly is {x}?", "What do you mean by {x}?"),
    ),
    (
        r"How do I (?P<x>.+)\?",
        ("How can I {x}?", "How to {x}?", "I want to {x}.", "Show me how to {x}.", "What is the command to {x}?",
         "Which command do I need to {x}?", "How does one {x}?", "How would I {x}?", "Help me {x}."),
    ),
    (r"Which states has (?P<x>.+)\?", ("What states can {x} be in?", "List the states of {x}.", "What are the states of {x}?")),
    (
        r"Which (?P<x>.+) are there\?",
        ("What {x} are there?", "List the {x}.", "Name the {x}.", "What are the {x}?", "Tell me the {x}.", "Which {x} exist?"),
    ),
    (r"Which (?P<x>.+)\?", ("What {x}?", "Tell me which {x}.")),
    (r"How (?P<v>does|do|is|are|will|can) (?P<x>.+)\?", ("Explain how {v} {x}.", "In what way {v} {x}?",
    "Tell me how {v} {x}?")),
    (r"How (?P<x>(?:many|large|long) .+)\?", ("Tell me how {x}.", "Do you know how {x}?")),
    (r"Can I (?P<x>.+)\?", ("Is it possible to {x}?", "May I {x}?", "Could I {x}?", "Am I able to {x}?")),
    (r"Why (?P<x>.+)\?", ("Tell me why {x}.", "For what reason {x}?", "Explain why {x}.")),
    (r"(?P<x>(?:Is|Are|Does|Do|Can) .+)\?", ("Tell me: {x}?", "I wonder: {x}?")),
)  # fmt: skip

_OTHER_WORDS: dict[str, tuple[str, ...]] = {
    "What is sllmctl?": (
        "What is this?", "What is this project?", "Tell me about this project.", "What can sllmctl do?",
        "What does sllmctl do?",
        "Introduce sllmctl.", "In one sentence, what is sllmctl?", "What kind of program is sllmctl?",
        "Give me a summary of sllmctl.",
    ),
    "Who are you?": ("What are you?", "What is your name?", "Introduce yourself.", "Which model are you?",
    "What model is this?"),
    "Hello": ("Hi", "Hey", "Hi there!", "Good morning", "Hello!", "Hello, how are you?", "Good evening", "Hello there"),
    "Thank you": ("Thanks a lot", "Many thanks", "Ok, thanks", "Thanks", "Thanks!", "Thank you very much.", "Great, thanks.",
                  "Bye", "Goodbye"),
    "What can I ask you?": ("Help", "What do you know?", "What can you do?", "Help me.", "What should I ask?"),
    "What is a cold start?": ("Why is the first request slow?", "What happens on the first request?", "What is cold starting?"),
    "Why is a cold start fast?": ("How can a cold start be so quick?", "Why do models start fast?",
    "What makes cold starts fast?"),
    "What is a tier?": ("Which tiers are there?", "What are the tiers?", "List the tiers.", "Name the tiers.",
    "What are tiers?"),
    "What is a checkpoint?": ("What are checkpoints?", "How are checkpoints named?"),
    "What is a journal?": ("What are journals?", "What does a journal contain?"),
    "How do I start the manager?": ("How do I start sllmctl?", "How do I run the server?", "How do I start the server?"),
    "How do I try sllmctl?": ("How do I get started?", "How do I run the demo?", "How do I begin?", "Getting started"),
    "How do I chat with a model?": ("How do I talk to a model?", "How do I send a prompt?", "How do I ask a model something?"),
    "How does a request travel through sllmctl?": (
        "Describe the path of a request.", "Walk me through a request.", "What happens to a request, step by step?",
        "Tell me everything about a request.", "Explain in detail how a request is served.", "How does sllmctl work?",
    ),
    "How does a request survive a crash?": ("What happens to my request in a crash?", "Do requests survive crashes?"),
    "Which exit codes are there?": ("What do the exit codes mean?", "Explain the exit codes.", "List all exit codes."),
    "Does sllmctl need a GPU?": ("Do I need a GPU?", "Can it run without a GPU?", "Does it run on a CPU?", "Is a GPU needed?"),
    "Does the manager need torch?": ("Is torch needed for the manager?", "Does the manager import torch?"),
    "Which license does sllmctl have?": ("What is the license?", "Is it open source?", "Under which license is it?"),
    "Is live migration built yet?": ("Is live migration available?", "Can I use live migration?", "Does live migration work?",
                                     "Is migration ready?", "Live migration"),
    "Is there a dashboard?": ("Is the dashboard ready?", "Where is the dashboard?", "Can I see a dashboard?",
                              "Is there a TUI?"),
    "Is there a simulator?": ("Can I simulate a cluster?", "Is the simulator ready?"),
    "Can sllmctl use more than one machine?": ("Can I add remote nodes?", "Does it work with several machines?",
                                               "Are remote nodes ready?",
                                               "Can I add a machine over SSH?"),
    "Which version of Python does sllmctl need?": ("Which Python do I need?", "What Python version is needed?",
                                                   "Python version?",
                                                   "Does it run on Python 3.12?"),
    "How do I get JSON output?": ("How do I get JSON?", "Can I have JSON?", "Print as JSON.", "How do I print JSON?"),
    "Which output formats are there?": ("What does -o take?", "Can I get YAML?", "Which formats can it print?"),
    "How does the planner decide?": ("How does the planner choose?", "How is a node chosen?", "Where will my model run?",
                                     "How are models placed?", "How does placement work?", "How does scheduling work?"),
    "How do I run the tests?": ("How do I test it?", "How are the tests run?", "Where are the tests?"),
    "How do I install sllmctl?": ("How do I install it?", "How do I set it up?", "Installation", "How do I get sllmctl?"),
    "How do I uninstall sllmctl?": ("How do I get rid of sllmctl?", "How do I remove sllmctl?"),
    "How do I remove a model?": ("How do I delete a model?", "How do I get rid of a model?", "How do I drop a model?"),
    "How do I add a model?": ("How do I ingest a model?", "How do I load my own model?", "How do I register a model?",
                              "How do I bring in a model?"),
    "How do I list models?": ("How do I see my models?", "Show all models.", "Which models are deployed?",
                            "Which models are there?"),
    "How do I list nodes?": ("How do I see the nodes?", "Show all nodes.", "Which nodes are there?"),
    "How do I list instances?": ("How do I see the instances?", "Show all instances.", "Which instances are running?"),
    "How do I list checkpoints?": ("How do I see the checkpoints?", "Show all checkpoints.", "Which checkpoints are there?"),
    "How do I list requests?": ("How do I see the requests?", "Show all requests.", "Which requests are running?"),
    "How do I see what happened?": ("How do I see events?", "How do I list events?", "Where is the log of events?"),
    "How do I stop the manager?": ("How do I stop sllmctl?", "How do I shut it down?", "How do I stop the server?"),
    "How is sllmctl configured?": ("How do I configure sllmctl?", "Where is the configuration?", "How do I change a setting?"),
    "What does keep-alive mean?": ("What is the keep-alive?", "When does an idle model stop?",
                                   "How long does an idle instance stay?"),
    "What happens when a client disconnects?": ("What if the client goes away?", "What if I close the connection?"),
    "Which endpoints are there?": ("Which endpoints does the API have?", "What URLs does it serve?", "Which routes are there?"),
    "Which API does sllmctl serve?": ("Is it compatible with OpenAI?", "Can I use the openai client?", "What API is it?"),
    "Do I need an API key?": ("Is a key needed?", "Where do I get an API key?", "Is there authentication?"),
    "How are weights checked?": ("Are there checksums?", "How do you know that weights are right?"),
    "What happens when the DRAM tier is full?": ("What if memory runs out?", "What is evicted?", "How does eviction work?"),
    "How large is the DRAM tier?": ("How large is the arena?", "How big is the arena?", "How much memory does it take?"),
    "Which phases has a cold start?": ("What are the phases of a cold start?", "Where does the time of a cold start go?"),
    "Who is sllmctl for?": ("Who should use sllmctl?", "Who uses it?"),
    "What problem does sllmctl solve?": ("Why sllmctl?", "Why should I use sllmctl?", "What is it good for?"),
    "Which paper is sllmctl built on?": ("What is the paper?", "Which research is behind it?", "Is it based on a paper?"),
    "Can two managers use one database?": ("Can I run two managers?", "What if I start two managers?"),
    "Can I trust your answers?": ("Are your answers right?", "Do you make mistakes?", "Are you always right?"),
    "How large are you?": ("How many parameters do you have?", "How big are you?", "What is your size?"),
}  # fmt: skip

_OPENINGS = (
    "Please tell me: ",
    "Hi! ",
    "Hello, ",
    "Can you tell me: ",
    "Question: ",
    "I would like to know: ",
    "Please: ",
    "So, ",
    "Tell me: ",
)
_CLOSINGS = (
    " Please.",
    " please",
    " Explain briefly.",
    " Answer in one sentence.",
    " Thanks!",
    " in sllmctl",
    " Be brief.",
    " Explain.",
)
_FILLERS = ("now", "here", "today", "really", "again", "exactly", "in this system", "with sllmctl", "my", "just", "ready",
            "then", "for me", "in detail", "all", "actually", "own", "available", "also")  # fmt: skip
_QUESTION_WORDS = frozenset(
    {"what", "how", "which", "why", "when", "where", "is", "are", "does", "do", "i", "can", "explain", "tell"}
)
_STARTS = ("what is", "what about", "how does", "how do i", "explain", "tell me about", "which", "is", "why", "")
_SMALL_WORDS = frozenset({"a", "an", "the", "is", "are", "does", "do", "of", "to", "i", "there", "it", "me", "sllmctl"})


def faq_pairs(page: Path) -> list[tuple[str, str]]:
    """Question and answer of every ``### `` heading of the page, in order, each answer as one paragraph."""
    pairs = []
    for part in page.read_text().split("\n### ")[1:]:
        question, _, rest = part.partition("\n")
        answer = rest.split("\n## ")[0]
        pairs.append((question.strip(), " ".join(answer.split())))
    return pairs


def phrasings(question: str) -> list[str]:
    """The question and what the templates make of it; the first template that fits is used."""
    found = [question, *_OTHER_WORDS.get(question, ())]
    for pattern, shapes in _TEMPLATES:
        if match := re.fullmatch(pattern, question):
            words = match.groupdict()
            found += [_capital(shape.format(**words)) for shape in shapes]
            break
    return list(dict.fromkeys(found))


def vary(question: str, rng: Random) -> str:
    """The question as somebody in a hurry might type it: other case, no mark, a greeting, words lost or too many, a slip."""
    text = question
    if rng.random() < 0.15:
        text = rng.choice(_OPENINGS) + (text if rng.random() < 0.5 else text[:1].lower() + text[1:])
    if rng.random() < 0.10:
        text += rng.choice(_CLOSINGS)
    if rng.random() < 0.12:
        words = text.split()
        small = [index for index, word in enumerate(words) if word.lower() in _SMALL_WORDS]
        if small and len(words) > 2:
            del words[rng.choice(small)]
            text = " ".join(words)
    if rng.random() < 0.12:
        words = text.split()
        words.insert(rng.randrange(1, len(words) + 1), rng.choice(_FILLERS))
        text = " ".join(words)
    if rng.random() < 0.10:
        text = " ".join(word for word in text.split() if rng.random() < 0.8) or text
    if rng.random() < 0.05:
        words = [word for word in text.split() if word.lower() not in _QUESTION_WORDS]
        text = " ".join([rng.choice(_STARTS), *words]).strip() or text
    if rng.random() < 0.08:
        text = text.replace(" a ", " the ") if " a " in text else text.replace(" the ", " a ")
    if rng.random() < 0.25:
        text = text.lower()
    if rng.random() < 0.30:
        text = text.rstrip("?.! ")
    if rng.random() < 0.06 and len(text) > 8:
        at = rng.randrange(1, len(text) - 1)
        text = text[:at] + text[at + 1 :]
    return text


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
