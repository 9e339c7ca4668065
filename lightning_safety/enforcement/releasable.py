# SPDX-License-Identifier: Apache-2.0
"""What acts on a model until it is released, by hand or at the end of a ``with`` statement."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self


class Releasable(ABC):
    """Acts on a model from its ``attach`` on, which returns it, until `release`."""

    @abstractmethod
    def release(self) -> None:
        """Stop acting, and leave no hook behind. Releasing twice does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()
