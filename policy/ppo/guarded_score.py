"""A reward function held to its word: one finite number a response, in time, or a clear end of the run."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator

from torch import Tensor

from policy.ppo.checks import check_scores
from policy.ppo.rollout import Responses, RewardFn
from rlhf.errors import USER_ERROR_STATUS, UserError, lost_process


class GuardedScore:
    """Calls a reward function and checks what it does.

    Args:
        reward_fn: the function.
        minutes: how long one call may take.
    """

    def __init__(self, reward_fn: RewardFn, minutes: float) -> None:
        self.reward_fn, self.minutes = reward_fn, minutes

    def __call__(self, responses: Responses) -> Tensor:
        """Scores, [B].

        Raises:
            UserError: the function raised, or did not return one finite number a response.
        """
        late = (
            f"ppo: the reward function has not answered for {self.minutes:g} minutes "
            "(ppo.score_timeout_minutes); the last checkpoint is whole"
        )
        with time_limit(60 * self.minutes, late):
            try:
                scores_B = self.reward_fn(responses)
            except UserError:
                raise
            except Exception as error:
                if lost_process(error) is not None:  # a sharded model scores on all processes together
                    raise
                reason = (str(error).splitlines() or [""])[0]
                raise UserError(
                    f"ppo: the reward function failed on {len(responses.texts)} responses "
                    f"({type(error).__name__}: {reason}); correct it and run again; the run resumes"
                ) from error
        if not isinstance(scores_B, Tensor):
            raise UserError(
                f"ppo: the reward function returned a {type(scores_B).__name__}, not a tensor with one "
                "finite number a response; correct it and run again, the run goes on where it was"
            )
        scores_B = scores_B.to(responses.ids_BT.device)
        check_scores(scores_B, len(responses.texts))
        return scores_B


@contextlib.contextmanager
def time_limit(seconds: float, message: str) -> Iterator[None]:
    """End the whole process with one line and the status of a user's error unless the block ends in time.

    A call that hangs in foreign code cannot be interrupted, so the process ends at once; what it keeps on
    disk is written atomically and stays whole.
    """
    watch = threading.Timer(seconds, _end, (message,))
    watch.daemon = True
    watch.start()
    try:
        yield
    finally:
        watch.cancel()


def _end(message: str) -> None:
    sys.stdout.flush()
    sys.stderr.write(f"error: {message}\n")
    sys.stderr.flush()
    os._exit(USER_ERROR_STATUS)
