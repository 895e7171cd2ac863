"""The turns of a chat, as many of the newest as the model's context has room for."""

from __future__ import annotations

from lumina_ds.config.chat_templates import DEFAULT_TEMPLATE, TEMPLATES
from lumina_ds.data.chat_template import Template, encode_prompt
from lumina_ds.data.rendering import read_reply
from lumina_ds.data.tokenizer.tokenizer import Tokenizer
from lumina_ds.data.turns import TrainReasoning, Turn
from lumina_ds.errors import ConfigError
from lumina_ds.text import counted


class History:
    """A conversation of user and assistant after an optional system turn. `context` is the model's, in tokens."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        context: int,
        system: str | None = None,
        template: Template = TEMPLATES[DEFAULT_TEMPLATE],
        train_reasoning: TrainReasoning = "yes",
    ) -> None:
        self.turns: list[Turn] = []
        self._tokenizer = tokenizer
        self._context = context
        self._template = template
        self._train_reasoning = train_reasoning
        self._opening = [Turn("system", system)] if system else []

    def ask(self, text: str) -> int:
        """Add the user's message; returns how many of the oldest exchanges had to go for it.

        They go while more than half the context is taken, so that a reply has room. Raises ConfigError, and changes
        nothing, where the message alone fills the context.
        """
        message = Turn("user", text)
        alone = self._num_tokens([message])
        if alone >= self._context:
            raise ConfigError(
                f"the message has {counted(alone, 'token')} with its markers and the model's context is {self._context:,}; "
                "say it shorter"
            )
        kept, num_dropped = [*self.turns, message], 0
        while len(kept) > 1 and self._num_tokens(kept) > self._context // 2:
            kept, num_dropped = kept[2:], num_dropped + 1
        self.turns = kept
        return num_dropped

    def answer(self, text: str) -> None:
        """Add the assistant's reply."""
        self.turns.append(read_reply(text))

    def reset(self) -> None:
        """Forget everything but the system turn."""
        self.turns = []

    @property
    def prompt(self) -> list[Turn]:
        """What the model is asked."""
        return [*self._opening, *self.turns]

    def _num_tokens(self, turns: list[Turn]) -> int:
        asked = [*self._opening, *turns]
        return len(encode_prompt(asked, self._tokenizer, self._template, train_reasoning=self._train_reasoning))
