"""The built-in templates: which pieces a conversation is made of, for each family of models.

    messages -> control tokens and texts, each trained or not

To add one, write a function from messages to pieces and enter it in TEMPLATES. `templates` turns
the pieces into ids, and holds for every template that text cannot become a control token.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from slap_ds.data.formats import Message


@dataclass(frozen=True, slots=True)
class Piece:
    """A control token, or text that is encoded on its own.

    `after` is the text that stands directly before this piece, with no control token between: the
    piece is then encoded as its continuation (a SentencePiece tokenizer would otherwise begin it
    with another space).
    """

    text: str
    control: bool = False
    trained: bool = False
    after: str = ""


@dataclass(frozen=True, slots=True)
class BuiltIn:
    """What a template is made of.

    `pieces(messages, prompt)` writes a conversation, with `prompt` on to where the next answer
    begins; it raises ValueError for one that it cannot write. `control` are the special tokens that
    the tokenizer must have, `stops` those of them that end an answer. `chat_template` is the same
    in Jinja, for the exported tokenizer. With `apart` texts are always encoded one by one.
    """

    pieces: Callable[[Sequence[Message], bool], Iterator[Piece]]
    control: tuple[str, ...]
    stops: tuple[str, ...]
    chat_template: str
    apart: bool = False


def _chatml(messages: Sequence[Message], prompt: bool) -> Iterator[Piece]:
    for message in messages:
        yield Piece("<|im_start|>", control=True)
        answers = message.role == "assistant"
        if answers:
            yield Piece("assistant\n")
            yield Piece(message.content, trained=message.trained, after="assistant\n")
        else:
            yield Piece(f"{message.role}\n{message.content}")
        yield Piece("<|im_end|>", control=True, trained=answers and message.trained)
        yield Piece("\n")
    if prompt:
        yield Piece("<|im_start|>", control=True)
        yield Piece("assistant\n")


def _llama3(messages: Sequence[Message], prompt: bool) -> Iterator[Piece]:
    def header(role: str) -> Iterator[Piece]:
        yield Piece("<|start_header_id|>", control=True)
        yield Piece(role)
        yield Piece("<|end_header_id|>", control=True)

    yield Piece("<|begin_of_text|>", control=True)
    for message in messages:
        text = message.content.strip()
        answers = message.role == "assistant"
        yield from header("ipython" if message.role == "tool" else message.role)
        if answers:
            yield Piece("\n\n")
            yield Piece(text, trained=message.trained, after="\n\n")
        else:
            yield Piece(f"\n\n{text}")
        yield Piece("<|eot_id|>", control=True, trained=answers and message.trained)
    if prompt:
        yield from header("assistant")
        yield Piece("\n\n")


def _llama2(messages: Sequence[Message], prompt: bool) -> Iterator[Piece]:
    system = ""
    for number, message in enumerate(messages, 1):
        # To the tokenizer these marks are plain text: only a refusal keeps a user's own apart.
        for mark in ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"):
            if mark in message.content:
                raise ValueError(f"message {number} holds {mark}, which the llama2 template uses")
        if message.role == "system":
            system = f"<<SYS>>\n{message.content}\n<</SYS>>\n\n"
        elif message.role == "user":
            yield Piece("<s>", control=True)
            yield Piece(f"[INST] {(system + message.content).strip()} [/INST]")
            system = ""
        elif message.role == "assistant":
            yield Piece(f" {message.content.strip()} ", trained=message.trained, after="[/INST]")
            yield Piece("</s>", control=True, trained=message.trained)
        else:
            raise ValueError(f"message {number}: the llama2 template has no role '{message.role}'")


TEMPLATES: dict[str, BuiltIn] = {
    "llama2": BuiltIn(
        _llama2,
        control=("<s>", "</s>"),
        stops=("</s>",),
        chat_template=(
            "{% set ns = namespace(system='') %}{% for message in messages %}"
            "{% if message['role'] == 'system' %}"
            r"{% set ns.system = '<<SYS>>\n' + message['content'] + '\n<</SYS>>\n\n' %}"
            "{% elif message['role'] == 'user' %}"
            "{{ '<s>[INST] ' + (ns.system + message['content']) | trim + ' [/INST]' }}"
            "{% set ns.system = '' %}"
            "{% elif message['role'] == 'assistant' %}"
            "{{ ' ' + message['content'] | trim + ' </s>' }}"
            "{% else %}{{ raise_exception('no role ' + message['role']) }}{% endif %}{% endfor %}"
        ),
    ),
    "llama3": BuiltIn(
        _llama3,
        control=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        stops=("<|eot_id|>",),
        chat_template=(
            "{{ '<|begin_of_text|>' }}{% for message in messages %}"
            "{% set role = 'ipython' if message['role'] == 'tool' else message['role'] %}"
            r"{{ '<|start_header_id|>' + role + '<|end_header_id|>\n\n' }}"
            "{{ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
            "{% if add_generation_prompt %}"
            r"{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
        ),
    ),
    "chatml": BuiltIn(
        _chatml,
        control=("<|im_start|>", "<|im_end|>"),
        stops=("<|im_end|>",),
        chat_template=(
            "{% for message in messages %}"
            r"{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
            "{% endfor %}{% if add_generation_prompt %}"
            r"{{ '<|im_start|>assistant\n' }}{% endif %}"
        ),
    ),
}
