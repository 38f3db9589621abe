"""How much shadow work may be done: a share of the tokens served."""

import threading


class Budget:
    """Tokens of shadow passes allowed, as a share of served tokens. Allowance is kept up to `most` tokens, so that a
    quiet hour does not buy a burst."""

    def __init__(self, share: float, most: int = 100_000) -> None:
        self.share = share
        self._most = most
        self._allowed = 0.0
        self._lock = threading.Lock()

    def served(self, tokens: int) -> None:
        with self._lock:
            self._allowed = min(self._allowed + tokens * self.share, self._most)

    def take(self, tokens: int) -> bool:
        """Spend `tokens`, or say that they are not there."""
        with self._lock:
            if tokens > self._allowed:
                return False
            self._allowed -= tokens
            return True
