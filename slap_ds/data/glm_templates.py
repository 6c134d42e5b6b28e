"""The built-in templates of the ChatGLM family: chatglm2, chatglm3 and glm4.

ChatGLM3 and GLM-4 open every message with a control token for its role, and have none that closes
it: an answer ends where the next role's token stands, or the end-of-text token after the last one.
That token is trained as the answer's stop. So is the newline after `<|assistant|>`, because the
prompt ends before it and the model writes it itself.

ChatGLM2 writes rounds of text. Its own multi-round prompt puts nothing between an answer and the
next round; here `</s>` stands there, or no answer but the last could teach the model to stop.
"""

from collections.abc import Callable, Collection, Iterator, Sequence

from slap_ds.data.builtin_templates import BuiltIn, Piece
from slap_ds.data.formats import Message

_ROLES = {
    "system": "<|system|>",
    "user": "<|user|>",
    "assistant": "<|assistant|>",
    "tool": "<|observation|>",
}


def _roles(end: str) -> Callable[[Sequence[Message], bool], Iterator[Piece]]:
    """`[gMASK] <sop>`, then for each message its role's token, a newline and its content."""

    def pieces(messages: Sequence[Message], prompt: bool) -> Iterator[Piece]:
        yield Piece("[gMASK]", control=True)
        yield Piece("<sop>", control=True)
        trained = False
        for message in messages:
            yield Piece(_ROLES[message.role], control=True, trained=trained)
            trained = message.role == "assistant" and message.trained
            # The newline stands where a tool call has its metadata; the model knows it as a text of
            # its own.
            yield Piece("\n", trained=trained)
            yield Piece(message.content, trained=trained)
        if prompt:
            yield Piece("<|assistant|>", control=True)
        elif messages[-1].role == "assistant":
            yield Piece(end, control=True, trained=trained)

    return pieces


def _chatglm2(messages: Sequence[Message], prompt: bool) -> Iterator[Piece]:
    yield Piece("[gMASK]", control=True)
    yield Piece("<sop>", control=True)
    system = ""
    turn = 0
    for number, message in enumerate(messages, 1):
        if message.role == "system":
            system = f"{message.content}\n\n"
        elif message.role == "user":
            turn += 1
            gap = "\n\n" if turn > 1 else ""
            yield Piece(f"{gap}{system}[Round {turn}]\n\n问：{message.content}\n\n答：")
            system = ""
        elif message.role == "assistant":
            yield Piece(message.content, trained=message.trained)
            yield Piece("</s>", control=True, trained=message.trained)
        else:
            raise ValueError(
                f"message {number}: the chatglm2 template has no role '{message.role}'"
            )


def _roles_in_jinja(newline: str, end: str) -> str:
    return (
        "{{ '[gMASK]<sop>' }}{% for message in messages %}"
        "{% set role = 'observation' if message['role'] == 'tool' else message['role'] %}"
        f"{{{{ '<|' + role + '|>{newline}' + message['content'] }}}}{{% endfor %}}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}"
        f"{{% elif messages[-1]['role'] == 'assistant' %}}{{{{ '{end}' }}}}{{% endif %}}"
    )


GLM_TEMPLATES: dict[str, BuiltIn] = {
    "chatglm2": BuiltIn(
        _chatglm2,
        control=("[gMASK]", "<sop>", "</s>"),
        stops=("</s>",),
        apart=True,
        chat_template=(
            "{{ '[gMASK]<sop>' }}{% set ns = namespace(system='', turn=0) %}"
            "{% for message in messages %}{% if message['role'] == 'system' %}"
            r"{% set ns.system = message['content'] + '\n\n' %}"
            "{% elif message['role'] == 'user' %}{% set ns.turn = ns.turn + 1 %}"
            r"{{ ('\n\n' if ns.turn > 1 else '') + ns.system + '[Round ' + ns.turn | string }}"
            r"{{ ']\n\n问：' + message['content'] + '\n\n答：' }}{% set ns.system = '' %}"
            # The space is the one with which SentencePiece begins a text of its own.
            "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + '</s>' }}"
            "{% else %}{{ raise_exception('no role ' + message['role']) }}{% endif %}{% endfor %}"
        ),
    ),
    "chatglm3": BuiltIn(
        _roles(end="</s>"),
        control=("[gMASK]", "<sop>", *_ROLES.values(), "</s>"),
        stops=("</s>", "<|user|>", "<|observation|>"),
        apart=True,
        chat_template=_roles_in_jinja(r"\n ", "</s>"),
    ),
    "glm4": BuiltIn(
        _roles(end="<|endoftext|>"),
        control=("[gMASK]", "<sop>", *_ROLES.values(), "<|endoftext|>"),
        stops=("<|endoftext|>", "<|user|>", "<|observation|>"),
        apart=True,
        chat_template=_roles_in_jinja(r"\n", "<|endoftext|>"),
    ),
}


def recognise_glm(special_tokens: Collection[str]) -> str | None:
    """The template of a converted tokenizer, from the special tokens that it has."""
    known = set(special_tokens)
    for name in ("glm4", "chatglm3", "chatglm2"):
        if known.issuperset(GLM_TEMPLATES[name].control):
            return name
    return None
