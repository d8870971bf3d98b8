"""Records that can be seen."""

from __future__ import annotations

import abc

from lazy_orbax.view.blocks import Block
from lazy_orbax.view.text import as_text


class Viewed(abc.ABC):
    """A record that can be seen: as text, and as HTML in a notebook."""

    @abc.abstractmethod
    def blocks(self) -> tuple[Block, ...]:
        """Returns what there is to see."""

    def __str__(self) -> str:
        return as_text(self.blocks())

    def _repr_html_(self) -> str:
        from lazy_orbax.view.html import as_html

        return as_html(self.blocks())
