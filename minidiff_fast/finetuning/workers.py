"""Environments in processes of their own, which are started again when they die."""

from __future__ import annotations

import multiprocessing
import pickle
import signal
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from minidiff_fast.errors import InvalidArgument, MinidiffFastError, MissingDependency, require

if TYPE_CHECKING:
    from gymnasium.vector import VectorEnv as _VectorEnv

    VectorEnv = _VectorEnv[Any, Any, Any]
else:
    VectorEnv = require("gymnasium.vector", extra="rl").VectorEnv

_POLL_SECONDS = 0.25  # a grandchild can hold the pipe of a dead worker open: look at the process itself as well


class WorkerFailed(MinidiffFastError, RuntimeError):
    """An environment raised an exception; the message shows it with its traceback."""


class TooManyRestarts(MinidiffFastError, RuntimeError):
    """Environment processes die again and again."""


class _Reply(NamedTuple):
    """What came back for a command."""

    data: Any
    died: bool


class RestartingVectorEnv(VectorEnv):
    """A gymnasium vector environment, one process per environment, that outlives the processes.

    Autoreset is SAME_STEP: the last observation of an episode is in ``infos["final_obs"]``, its info in
    ``infos["final_info"]``. A process that dies (killed, out of memory, a crash in a simulator) is noticed within
    ``_POLL_SECONDS``, started again and reset, while the others keep their states. The row of the dead environment then
    has reward 0, ``truncated``, ``infos["restarted"]``, and as ``final_obs`` the observation before the step; it is no
    transition. A Python exception in an environment is not a death: it is raised here as :class:`WorkerFailed`, and so
    is a death during ``call``, ``get_attr``, ``set_attr`` or ``render``, which have no row to give up.

    Restarted environments are seeded from the seed of ``reset`` and the number of the restart, and get the attributes
    that ``set_attr`` has set. SIGINT is left to this process: a run that stops between steps finds its workers alive.

    Args:
        env_fns: make one environment each.
        max_restarts: more restarts than this within ``per_steps`` calls of ``step`` are an error.
        per_steps: see ``max_restarts``.
        timeout: seconds after which a process that does not answer is killed and counts as dead; None waits as long as
            it lives.
        context: start method of :mod:`multiprocessing`; None is the platform's.

    Raises:
        InvalidArgument: no environments, or environments whose spaces differ.
        WorkerFailed, TooManyRestarts: also in every later call.
    """

    def __init__(
        self,
        env_fns: Sequence[Callable[[], Any]],
        *,
        max_restarts: int = 10,
        per_steps: int = 1000,
        timeout: float | None = None,
        context: str | None = None,
    ) -> None:
        gymnasium = require("gymnasium", extra="rl")
        if not env_fns:
            raise InvalidArgument("RestartingVectorEnv: env_fns must have at least one environment, got none")
        self.num_envs = len(env_fns)
        self.max_restarts, self.per_steps, self.timeout = max_restarts, per_steps, timeout
        self.restarts = 0
        """Processes started again so far."""
        self._fns = [gymnasium.vector.utils.CloudpickleWrapper(fn) for fn in env_fns]
        self._context: Any = multiprocessing.get_context(context)
        self._steps = 0
        self._recent: deque[int] = deque()
        self._restarts_of = [0] * self.num_envs
        self._seeds: list[int | None] = [None] * self.num_envs
        self._options: dict[str, Any] | None = None
        self._attributes: dict[str, list[Any]] = {}
        self._last: list[Any] = [None] * self.num_envs
        self._running = False
        self._asked = 0  # a reply that nobody has waited for (KeyboardInterrupt) must not pass for the next one
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        for index in range(self.num_envs):
            pipe, process = self._start(index)
            self._pipes.append(pipe)
            self._processes.append(process)
        described = [reply.data for reply in self._ask([("describe", None)] * self.num_envs, survive=False)]
        for index, other in enumerate(described):
            if other[:2] != described[0][:2]:
                self._abandon()
                raise InvalidArgument(
                    f"RestartingVectorEnv: environments must have the same spaces; 0 has {described[0][:2]}, "
                    f"{index} has {other[:2]}"
                )
        self.single_observation_space, self.single_action_space, metadata, self.render_mode = described[0]
        self.observation_space = gymnasium.vector.utils.batch_space(self.single_observation_space, self.num_envs)
        self.action_space = gymnasium.vector.utils.batch_space(self.single_action_space, self.num_envs)
        self.metadata = {**metadata, "autoreset_mode": same_step()}

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Reset all environments; environment i gets ``seed + i``, or the i-th of a list."""
        seeds: list[int | None]
        if seed is None or isinstance(seed, (int, np.integer)):
            seeds = [None if seed is None else int(seed) + index for index in range(self.num_envs)]
        else:
            seeds = list(seed)
        if len(seeds) != self.num_envs:
            raise InvalidArgument(f"RestartingVectorEnv.reset: seed must have {self.num_envs} ints, got {len(seeds)}")
        self._seeds, self._options = seeds, options
        replies = self._ask([("reset", {"seed": each, "options": options}) for each in seeds])
        infos: dict[str, Any] = {}
        for index, reply in enumerate(replies):
            self._last[index], info = self._fresh(index) if reply.died else reply.data
            infos = self._add_info(infos, info, index)
        self._running = True
        return self._batched(self._last), infos

    def step(self, actions: Any) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """One step of every environment; see the class for what a dead one gives."""
        if not self._running:
            raise InvalidArgument("RestartingVectorEnv.step: call reset first")
        utils = require("gymnasium.vector.utils", extra="rl")
        commands = [("step", action) for action in utils.iterate(self.action_space, actions)]
        if len(commands) != self.num_envs:
            raise InvalidArgument(
                f"RestartingVectorEnv.step: actions must be one for each of {self.num_envs} environments, got "
                f"{len(commands)}"
            )
        self._steps += 1
        replies = self._ask(commands)
        reward = np.zeros(self.num_envs)
        terminated, truncated, restarted = (np.zeros(self.num_envs, dtype=bool) for _ in range(3))
        final_obs = np.full(self.num_envs, None, dtype=object)
        infos: dict[str, Any] = {}
        for index, reply in enumerate(replies):
            if reply.died:
                final_obs[index], final_info = self._last[index], {}
                self._last[index], info = self._fresh(index)
                truncated[index] = restarted[index] = True
            else:
                obs, reward[index], terminated[index], truncated[index], info, final = reply.data
                self._last[index] = obs
                if final is None:
                    infos = self._add_info(infos, info, index)
                    continue
                final_obs[index], final_info = final
            infos = self._add_info(infos, {**info, "final_info": final_info}, index)
        ended = terminated | truncated
        if ended.any():
            infos |= {"final_obs": final_obs, "_final_obs": ended}
        if restarted.any():
            infos |= {"restarted": restarted, "_restarted": restarted.copy()}
        return self._batched(self._last), reward, terminated, truncated, infos

    def call(self, name: str, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Call a method of every environment, or read an attribute."""
        replies = self._ask([("call", (name, args, kwargs))] * self.num_envs, survive=False)
        return tuple(reply.data for reply in replies)

    def get_attr(self, name: str) -> tuple[Any, ...]:
        """An attribute of every environment."""
        return self.call(name)

    def set_attr(self, name: str, values: Any) -> None:
        """Set an attribute of every environment: one value, or a list or tuple with one each."""
        each = list(values) if isinstance(values, (list, tuple)) else [values] * self.num_envs
        if len(each) != self.num_envs:
            raise InvalidArgument(f"RestartingVectorEnv.set_attr: expected {self.num_envs} values, got {len(each)}")
        self._attributes[name] = each
        self._ask([("set", (name, value)) for value in each], survive=False)

    def render(self) -> tuple[Any, ...] | None:
        """A frame of every environment."""
        return self.call("render")

    def close_extras(self, timeout: float = 2.0, **kwargs: Any) -> None:
        """Ask the processes to close their environments; kill those that have not within ``timeout`` seconds."""
        for pipe in self._pipes:
            _send(pipe, (0, "close", None))
        end = time.monotonic() + timeout
        for process in self._processes:
            process.join(max(0.0, end - time.monotonic()))
        self._abandon()

    def __del__(self) -> None:
        if not self.closed and hasattr(self, "_processes"):
            self._abandon()

    def _start(self, index: int) -> tuple[Connection, Any]:
        pipe, theirs = self._context.Pipe()
        process = self._context.Process(
            target=_work, args=(self._fns[index], theirs, pipe), name=f"environment-{index}", daemon=True
        )
        process.start()
        theirs.close()
        return pipe, process

    def _abandon(self) -> None:
        """End all processes, whatever they are doing."""
        self.closed = True
        for process in self._processes:
            if process.is_alive():
                process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()

    def _restart(self, index: int) -> None:
        """Replace a dead process, unless too many have died."""
        process = self._processes[index]
        self._recent.append(self._steps)
        while self._recent[0] <= self._steps - self.per_steps:
            self._recent.popleft()
        if len(self._recent) > self.max_restarts:
            process.join()
            code, died = process.exitcode, len(self._recent)
            self._abandon()
            raise TooManyRestarts(
                f"RestartingVectorEnv: environment processes died {died} times within {self.per_steps} steps (at most "
                f"{self.max_restarts} are restarted); the last was environment {index}, exit code {code}"
            )
        process.join()
        self._pipes[index].close()
        self._pipes[index], self._processes[index] = self._start(index)
        self.restarts += 1
        self._restarts_of[index] += 1

    def _fresh(self, index: int) -> tuple[Any, dict[str, Any]]:
        """First observation and info of an environment that was just started; it may die again meanwhile."""
        while True:
            seed = self._seeds[index]
            if seed is not None:
                mixed = np.random.SeedSequence([seed, self._restarts_of[index]])
                seed = int(mixed.generate_state(1)[0])
            commands: list[tuple[str, Any]] = [("set", (name, each[index])) for name, each in self._attributes.items()]
            commands.append(("reset", {"seed": seed, "options": self._options}))
            for command in commands:
                reply = self._ask({index: command})[0]
                if reply.died:
                    break
            else:
                fresh: tuple[Any, dict[str, Any]] = reply.data
                return fresh

    def _ask(self, commands: Any, *, survive: bool = True) -> list[_Reply]:
        """Send commands (one each, or by index) and wait for all replies; those that died have been started again.

        With ``survive=False`` a death is an error: there is nothing to go on with.
        """
        if self.closed:
            raise InvalidArgument("RestartingVectorEnv: it is closed, or one of its environments failed")
        asked = dict(enumerate(commands)) if isinstance(commands, Sequence) else commands
        replies: dict[int, _Reply] = {}
        waiting = set(asked)
        self._asked += 1
        for index, command in asked.items():
            _send(self._pipes[index], (self._asked, *command))  # a dead one is found below
        end = None if self.timeout is None else time.monotonic() + self.timeout
        while waiting:
            wait([self._pipes[i] for i in waiting] + [self._processes[i].sentinel for i in waiting], _POLL_SECONDS)
            late = end is not None and time.monotonic() > end
            for index in sorted(waiting):
                reply = self._reply(index, late)
                if reply is not None:
                    replies[index] = reply
                    waiting.discard(index)
        failed = [(i, reply.data) for i, reply in replies.items() if isinstance(reply.data, _Failure)]
        if failed:
            self._abandon()
            raise WorkerFailed(
                "\n".join(f"environment {i} raised {failure.summary}\n{failure.trace}" for i, failure in failed)
            )
        dead = [index for index, reply in sorted(replies.items()) if reply.died]
        if dead and not survive:
            codes = [self._processes[index].exitcode for index in dead]
            self._abandon()
            raise WorkerFailed(f"the processes of environments {dead} died, exit codes {codes}")
        for index in dead:
            self._restart(index)
        return [replies[index] for index in sorted(replies)]

    def _reply(self, index: int, late: bool) -> _Reply | None:
        """What has arrived from a process; None while it lives and is silent."""
        pipe, process = self._pipes[index], self._processes[index]
        alive = process.is_alive()  # before the pipe is read: what it sent before it died still counts
        try:
            while pipe.poll():
                number, data = pipe.recv()
                if number == self._asked:
                    return _Reply(data, died=False)
        except (EOFError, OSError):
            process.join(1.0)
            alive = False
        if alive and not late:
            return None
        if process.is_alive():
            process.kill()
            process.join()
        return _Reply(None, died=True)

    def _batched(self, observations: Iterable[Any]) -> Any:
        utils = require("gymnasium.vector.utils", extra="rl")
        empty = utils.create_empty_array(self.single_observation_space, n=self.num_envs, fn=np.zeros)
        return utils.concatenate(self.single_observation_space, list(observations), empty)


class _Failure(NamedTuple):
    """A Python exception in a worker."""

    summary: str
    trace: str


def same_step() -> Any:
    """gymnasium's ``AutoresetMode.SAME_STEP``."""
    modes = getattr(require("gymnasium.vector", extra="rl"), "AutoresetMode", None)
    if modes is None:
        version = require("gymnasium", extra="rl").__version__
        raise MissingDependency(f"gymnasium >= 1.1 is needed, which has autoreset modes; installed is {version}")
    return modes.SAME_STEP


def _send(pipe: Connection, message: Any) -> bool:
    try:
        pipe.send(message)
    except OSError:  # the other end is gone
        return False
    return True


def _work(env_fn: Any, pipe: Connection, theirs: Connection) -> None:
    """The process of one environment: answers until it is told to close, or the other end is gone."""
    theirs.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a forked process has the handlers of a training run
    env: Any = None
    try:
        while True:
            number, command, data = pipe.recv()
            if command == "close":
                break
            try:
                env = env_fn() if env is None else env
                reply = _answer(env, command, data)
            except Exception as error:
                reply = _Failure(f"{type(error).__name__}: {error}", traceback.format_exc())
            try:
                pipe.send((number, reply))
            except (pickle.PicklingError, TypeError, AttributeError) as error:  # whatever an info holds
                pipe.send((number, _Failure(f"{type(error).__name__}: {error}", traceback.format_exc())))
    except (EOFError, ConnectionError):  # the process that asks is gone
        return
    finally:
        if env is not None:
            env.close()


def _answer(env: Any, command: str, data: Any) -> Any:
    if command == "describe":
        return env.observation_space, env.action_space, dict(env.metadata), env.render_mode
    if command == "reset":
        return env.reset(**data)
    if command == "set":
        env.set_wrapper_attr(*data)
        return None
    if command == "call":
        name, args, kwargs = data
        found = env.get_wrapper_attr(name)
        return found(*args, **kwargs) if callable(found) else found
    obs, reward, terminated, truncated, info = env.step(data)
    if not (terminated or truncated):
        return obs, reward, terminated, truncated, info, None
    first, first_info = env.reset()
    return first, reward, terminated, truncated, first_info, (obs, info)
