"""How rows become token ids: the choices, each with its default, that decide what is learnt."""

from dataclasses import dataclass
from typing import Literal

Template = Literal["chat", "plain"]
ResponseForm = Literal["alone", "template"]
Targets = Literal["response", "every_turn"]
OverLong = Literal["drop", "error", "truncate"]
OnBadRow = Literal["error", "drop"]
Duplicates = Literal["keep", "drop"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """Equal rules on equal rows with an equal tokenizer give equal token ids."""

    template: Template = "chat"
    """`chat`: the tokenizer's chat template with its generation prompt. `plain`: `Question: ...`,
    a line break and `Answer:`."""
    response: ResponseForm = "alone"
    """`alone`: the response is tokenized by itself and the tokenizer's end-of-sequence token put
    behind it, as in the paper. `template`: the assistant's turn as the chat template renders it, up
    to the special token that closes it."""
    targets: Targets = "response"
    """`response`: the row's response, which is the last turn of the assistant, and its end.
    `every_turn`: the earlier turns of the assistant too, each with the token that closes it."""
    over_long: OverLong = "drop"
    """What happens to a row longer than a pack. A truncated row has no end-of-sequence target."""
    on_bad_row: OnBadRow = "error"
    """A row that cannot be used ends the work with its place, or is dropped into the ledger."""
    duplicates: Duplicates = "keep"
    """Rows whose token ids and targets equal an earlier row's are listed either way."""
    prompt_column: str | None = None
    """Column of the prompt, text or turns; None finds `messages`, `message` or `prompt`."""
    response_column: str | None = None
    """Column of the response; None finds `response` or `completion`, or takes the last turn."""

    def __post_init__(self) -> None:
        if self.template == "plain" and (self.response, self.targets) != ("alone", "response"):
            raise ValueError(
                f"template is 'plain' with response {self.response!r} and targets "
                f"{self.targets!r}: a plain template has no markup that could close a turn; use "
                "response 'alone' and targets 'response', or template 'chat'"
            )

    @property
    def needs_chat_template(self) -> bool:
        return self.template == "chat"
