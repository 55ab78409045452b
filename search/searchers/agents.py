"""RLlib's agents as drivers of a decision process."""

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

from search.evaluate import Evaluation
from search.searchers.processes import MOST_REPEATS, Drive, Process

if TYPE_CHECKING:
    from search.agents.ddpg import DDPGOptions
    from search.agents.rllib import AgentName

__all__ = ["agent"]

# DDPG's exploration ends at this share of an action's range whatever the evaluations; NNCF, too,
# lets the decay follow a search's length. What counts is the best that was ever scored, not the
# last policy: less noise would only score the same again.
_LAST_STD = 0.1
# HAQ's single update for a step learns too little in some hundred short episodes: of five problems
# with a known optimum it solved two or three, four updates four. Both numbers were chosen on those
# five (tests/test_known_optimum.py, seeds 0 to 4); the test asks for others.
_UPDATES_PER_STEP = 4.0


def agent(name: "AgentName") -> Drive:
    """Return the driver that lets an agent play: DDPG is ours, the others are RLlib's."""

    def drive(
        process: Process, *, starts: Sequence[Sequence[float]], evaluations: int, seed: int
    ) -> Generator[Evaluation]:
        from search.agents.rllib import run_agent  # noqa: PLC0415 (RLlib takes seconds)

        if starts and name != "ddpg":
            raise ValueError(f"{name} cannot be started from allocations, got {len(starts)}")
        effort = process.problem.effort
        ends = run_agent(
            name,
            process,
            episodes=MOST_REPEATS * evaluations,
            seed=seed,
            num_runners=effort.runners,
            cpus_per_runner=effort.cpus,
            gpus_per_runner=effort.gpus,
            checkpoint=effort.checkpoint,
            fingerprint=process.problem.tables.space.fingerprint,
            options=_ddpg(evaluations, starts) if name == "ddpg" else None,
        )
        for played in ends:
            for end in played:
                yield end.info["evaluation"]

    return drive


def _ddpg(evaluations: int, starts: Sequence[Sequence[float]]) -> "DDPGOptions":
    """Return HAQ's numbers, but for more updates and a noise that lasts."""
    from search.agents.ddpg import DDPGOptions  # noqa: PLC0415

    own = DDPGOptions()
    warmup = min(own.warmup_episodes, max(1, evaluations // 4))
    rest = max(1, evaluations - warmup)
    return DDPGOptions(
        warmup_episodes=warmup,
        updates_per_step=_UPDATES_PER_STEP,
        noise_decay=(_LAST_STD / own.noise_std) ** (1 / rest),
        first_actions=tuple(tuple(actions) for actions in starts),
    )
