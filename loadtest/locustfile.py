"""Load tests for the student, the baseline and the A/B router: `locust -f loadtest/` (docs/load-testing.md).

    locust -f loadtest/ --headless -u 20 -t 30s                        20 requests a second over gRPC, both arms
    locust -f loadtest/ --headless -u 20 -t 30s Router                 the same through the router
    locust -f loadtest/ --headless --find-capacity --arms student      the highest rate with p99 under --p99-ms

One user is a source of --rate requests a second (1 unless told), so -u is the rate. Requests leave on schedule whether
or not earlier ones were answered, and latency counts from the scheduled moment: a stalled server cannot slow the clock.
The ...Closed users wait for each answer as most load tests do, to show what that hides.
"""

from __future__ import annotations

import grpc.experimental.gevent

grpc.experimental.gevent.init_gevent()  # before any channel exists: without it every call blocks the whole process

import logging  # noqa: E402
import random  # noqa: E402
import sys  # noqa: E402
from dataclasses import replace  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any, ClassVar  # noqa: E402

import gevent  # noqa: E402
import numpy as np  # noqa: E402
from locust import User, constant_throughput, events, task  # noqa: E402
from locust.runners import STATE_MISSING, MasterRunner, WorkerRunner  # noqa: E402

from clients.triton.connection import TritonAccess, TritonConnection, read_token  # noqa: E402
from loadtest import _results  # noqa: E402
from loadtest._capacity import SHORTEST_STEP_S, CapacitySettings, CapacityShape  # noqa: E402
from loadtest._recorder import Recorder, clock  # noqa: E402
from loadtest._request_pool import RankRequest, RequestPool, check_scores, exponential_gap, parse_sizes  # noqa: E402
from loadtest._server_metrics import ServerMetrics, difference, scrape, settled  # noqa: E402
from loadtest._targets import INTERLEAVED, RequestFailed, RouterTarget, Target, TritonTarget  # noqa: E402
from ranking.errors import InputError  # noqa: E402

logger = logging.getLogger("loadtest")

STOP_SECONDS = 5.0  # that a worker may take to stop its users, beside its requests' deadline


@events.init_command_line_parser.add_listener
def add_options(parser) -> None:
    """Add the load test's own flags to Locust's."""
    group = parser.add_argument_group("DisRanker")
    group.add_argument("--data", default="data/world", help="dataset folder whose queries and documents are sent")
    group.add_argument("--split", default="test", help="judged split to draw from")
    group.add_argument("--grpc-url", default="127.0.0.1:8001", help="Triton's gRPC address")
    group.add_argument("--http-url", default="127.0.0.1:8000", help="Triton's HTTP address")
    group.add_argument("--router-url", default="127.0.0.1:8080", help="the A/B router's address")
    group.add_argument(
        "--metrics-url", default="127.0.0.1:8002", help="Triton's metrics address; empty to leave it out"
    )
    # the addresses may be URLs, for TLS with grpcs:// and https://
    group.add_argument("--ca", default="", help="PEM file of the authority that signed the servers' certificates")
    group.add_argument("--certificate", default="", help="PEM file of the certificate that is shown to the servers")
    group.add_argument("--key", default="", help="PEM file of that certificate's key")
    group.add_argument(
        "--token-file", default="", help="file with the bearer token for Triton; else the variable DISRANKER_TOKEN"
    )
    group.add_argument("--router-key-file", default="", help="file with the router's key, where it asks for one")
    group.add_argument(
        "--arms", default="student,baseline", help="models to load, requests alternate; the router chooses itself"
    )
    group.add_argument("--rate", type=float, default=1.0, help="requests a second of one user, so -u times this in all")
    group.add_argument("--arrivals", default="poisson", choices=["poisson", "constant"], help="how requests are spaced")
    group.add_argument("--list-sizes", default="24:0.5,48:0.5", help="documents a request, with shares")
    group.add_argument("--zipf", type=float, default=1.0, help="skew of query frequencies; 0 is uniform")
    group.add_argument("--seed", type=int, default=1, help="of requests and arrivals")
    group.add_argument(
        "--deadline-ms", type=float, default=10_000.0, help="a request without an answer by then has failed"
    )
    group.add_argument(
        "--max-outstanding", type=int, default=2000, help="requests in flight per process; more are failed unsent"
    )
    group.add_argument(
        "--score-tolerance", type=float, default=0.1, help="how far a score may move between two equal requests"
    )
    group.add_argument("--user-pool", type=int, default=100_000, help="distinct user ids sent to the router")
    group.add_argument(
        "--find-capacity", action="store_true", help="search the highest rate that holds --p99-ms, per arm"
    )
    group.add_argument("--p99-ms", type=float, default=100.0, help="latency target of --find-capacity")
    group.add_argument("--start-rate", type=float, default=4.0, help="first rate of --find-capacity, requests a second")
    group.add_argument("--max-rate", type=float, default=2000.0, help="highest rate of --find-capacity")
    group.add_argument("--step-s", type=float, default=10.0, help="seconds that a step of --find-capacity is measured")
    group.add_argument("--json-out", default="loadtest.json", help="where the result goes; empty for none")


class Run:
    """What the users of one process share: the request pool, the recorder and the arm under test."""

    def __init__(self) -> None:
        self.recorder = Recorder()
        self.pool: RequestPool | None = None
        self.arms: list[str] = []
        self.first_scores: dict[tuple[str, int], np.ndarray] = {}
        self.targets: dict[str, Target] = {}
        self.metrics_before = ServerMetrics({}, "not scraped")
        self.capacity: CapacityShape | None = None
        self.outstanding = 0
        self.next_arm = 0
        self.users_started = 0
        self.landed: set[str] = set()  # workers that a master has the last tallies of

    def number_user(self) -> int:
        """The number of a user that starts: 0, 1, ... in this process."""
        self.users_started += 1
        return self.users_started - 1

    def choose_arm(self) -> str:
        """The arm of the next request: the arms take turns."""
        self.next_arm += 1
        return self.arms[self.next_arm % len(self.arms)]


run = Run()


def make_target(protocol: str, options) -> Target:
    """One connection, or pool of them, per protocol and process: users share it. InputError: its address is none."""
    names = ("token_file", "ca", "certificate", "key")
    files = {name: Path(path) for name in names if (path := getattr(options, name))}
    access = TritonAccess(**files).credentials()
    if protocol == "router":  # Triton's token is none of its business
        key = options.router_key_file
        access = replace(access, token=read_token(Path(key), "--router-key-file") if key else None)
        return RouterTarget(options.router_url, options.deadline_ms, options.user_pool, access)
    address = options.grpc_url if protocol == "grpc" else options.http_url
    connection = TritonConnection(address if "://" in address else f"{protocol}://{address}", access)
    if connection.is_grpc != (protocol == "grpc"):
        raise InputError(f"{address}: Triton's address for {protocol} is needed: {protocol}://host:port")
    return TritonTarget(connection, options.deadline_ms)


class RankingUser(User):
    """What all users do: draw a request, send it, check the answer, record it from its intended start."""

    abstract = True
    protocol: ClassVar[str] = ""

    def on_start(self) -> None:
        """Share one connection per protocol among the users of a process."""
        options = self.environment.parsed_options
        if self.protocol not in run.targets:
            run.targets[self.protocol] = make_target(self.protocol, options)
        self.target = run.targets[self.protocol]

    def exchange(self, intended: float) -> None:
        """Send one request that was meant to leave at `intended` (clock()) and record what came of it."""
        assert run.pool is not None
        request, arm = run.pool.draw(), run.choose_arm()
        if self.protocol == "router":
            arm = "router"
        second = int(intended)
        run.recorder.sent(second, arm, (clock() - intended) * 1000)
        problem: Exception | None = None
        documents = len(request.doc_ids)
        try:
            answer = self.target.send(arm, request)
            self.check(answer.model, request, answer.scores)
        except RequestFailed as failure:
            problem = failure
        except gevent.GreenletExit:  # a closed-loop user is stopped in mid-request
            run.recorder.withdrawn(second, arm)
            raise
        milliseconds = (clock() - intended) * 1000
        if problem is None:
            run.recorder.answered(second, arm, milliseconds, documents, answer.chunks)
        else:
            run.recorder.failed(second, arm, str(problem))
        self.environment.events.request.fire(
            request_type=self.protocol,
            name=f"{arm} {documents} documents",
            response_time=milliseconds,
            response_length=documents * 4,
            exception=problem,
            context={},
            start_time=intended,
        )

    def check(self, arm: str, request: RankRequest, scores: np.ndarray) -> None:
        """Compare scores with the first answer to the same request. RequestFailed if they are wrong."""
        key = (arm, request.number)
        tolerance = self.environment.parsed_options.score_tolerance
        if wrong := check_scores(request, scores, run.first_scores.get(key), tolerance):
            raise RequestFailed(f"wrong answer: {wrong}")
        if arm != INTERLEAVED:  # its coins give a document another model's score each time
            run.first_scores.setdefault(key, scores)


class OpenLoopUser(RankingUser):
    """A source of arrivals: each request leaves at its time in a greenlet of its own."""

    abstract = True

    @task
    def arrivals(self) -> None:
        """Send requests on schedule until the test stops."""
        options = self.environment.parsed_options
        # the same arrivals in every run of one seed, others for each user of each worker process; Random hashes a text
        # itself, the same in every process, unlike hash()
        worker = getattr(self.environment.runner, "worker_index", 0)
        chance = random.Random(f"{options.seed}-{worker}-{run.number_user()}")
        intended = clock() + chance.random() / options.rate  # users must not start in step
        while True:
            gevent.sleep(max(0.0, intended - clock()))
            if run.outstanding >= options.max_outstanding:
                run.recorder.sent(int(intended), run.arms[0], 0.0)
                run.recorder.failed(int(intended), run.arms[0], "not sent: --max-outstanding requests are unanswered")
            else:
                run.outstanding += 1
                gevent.spawn(self.exchange, intended).link(_landed)
            intended += exponential_gap(chance, options.rate) if options.arrivals == "poisson" else 1 / options.rate


def _landed(_greenlet) -> None:
    run.outstanding -= 1


class ClosedLoopUser(RankingUser):
    """The usual load-test user: it waits for an answer, then paces itself to --rate. A stall stops its clock."""

    abstract = True

    def wait_time(self) -> float:
        """Seconds until the next request, so that --rate is held."""
        return constant_throughput(self.environment.parsed_options.rate)(self)

    @task
    def one(self) -> None:
        """Send one request and wait for its answer."""
        self.exchange(clock())


class TritonGrpc(OpenLoopUser):
    """Open loop over gRPC, straight to Triton."""

    protocol = "grpc"


class TritonHttp(OpenLoopUser):
    """Open loop over HTTP, straight to Triton."""

    protocol = "http"


class Router(OpenLoopUser):
    """Open loop through the A/B router."""

    protocol = "router"


class TritonGrpcClosed(ClosedLoopUser):
    """Closed loop over gRPC, straight to Triton."""

    protocol = "grpc"


class TritonHttpClosed(ClosedLoopUser):
    """Closed loop over HTTP, straight to Triton."""

    protocol = "http"


class RouterClosed(ClosedLoopUser):
    """Closed loop through the A/B router."""

    protocol = "router"


@events.init.add_listener
def prepare(environment, **_) -> None:
    """Choose users and shape, and read the requests before the first one is due."""
    options = environment.parsed_options
    run.arms = [arm for arm in options.arms.split(",") if arm]
    check_options(options)
    if not isinstance(environment.runner, WorkerRunner) and not options.user_classes:
        environment.user_classes = [TritonGrpc]
    if not isinstance(environment.runner, MasterRunner):
        try:
            sizes = parse_sizes(options.list_sizes)
            run.pool = RequestPool(Path(options.data), options.split, sizes, options.zipf, options.seed)
            run.targets = {each: make_target(each, options) for each in {c.protocol for c in environment.user_classes}}
        except InputError as problem:
            print(f"error: {problem}", file=sys.stderr)
            raise SystemExit(1) from problem
    if options.find_capacity and not isinstance(environment.runner, WorkerRunner):
        run.capacity = environment.shape_class = CapacityShape(
            run.recorder, capacity_settings(environment), lambda arm: announce(environment, arm)
        )
    if isinstance(environment.runner, WorkerRunner):
        environment.runner.register_message("arm", lambda msg, **_: set_arm(msg.data["arm"]))
        environment.runner.register_message("land", lambda **_: land(environment.runner))
    if isinstance(environment.runner, MasterRunner):
        environment.runner.register_message("landed", lambda msg, **_: take_landed(msg.node_id, msg.data))
    # reading the requests blocked the event loop, whose clock stood still: a run time of two seconds would count
    # from before the reading, and end before the first request
    gevent.get_hub().loop.update_now()


ABOVE_0 = (
    "rate", "deadline_ms", "max_outstanding", "user_pool", "p99_ms", "start_rate", "max_rate", "step_s",
)  # fmt: skip


def check_options(options) -> None:
    """End the process with one line where a flag makes no sense: else every simulated caller would die of it."""
    problem = "" if run.arms else f"--arms {options.arms!r}: a model is needed"
    for name in ABOVE_0:
        if not 0 < getattr(options, name) < float("inf"):
            problem = f"--{name.replace('_', '-')} is {getattr(options, name)}: it must be above 0"
    if options.step_s < SHORTEST_STEP_S:
        problem = f"--step-s is {options.step_s}: at least {SHORTEST_STEP_S} seconds are needed"
    if not 0 <= options.zipf < float("inf"):
        problem = f"--zipf is {options.zipf}: 0 or more is needed"
    if problem:
        print(f"error: {problem}", file=sys.stderr)
        raise SystemExit(1)


def capacity_settings(environment) -> CapacitySettings:
    """What --find-capacity is to search, from the flags."""
    options = environment.parsed_options
    router = [c.__name__ for c in environment.user_classes] in (["Router"], ["RouterClosed"])
    settle = 5.0 if isinstance(environment.runner, MasterRunner) else 2.0  # workers report every three seconds
    return CapacitySettings(
        ["router"] if router else run.arms,
        options.start_rate,
        options.max_rate,
        options.p99_ms,
        options.step_s,
        settle,
        options.rate,
    )


def announce(environment, arm: str) -> None:
    """Tell all workers which arm is under test."""
    set_arm(arm)
    if isinstance(environment.runner, MasterRunner):
        environment.runner.send_message("arm", {"arm": arm})


def set_arm(arm: str) -> None:
    """Load only this arm from now on; the router chooses its arms itself."""
    if arm != "router":
        run.arms = [arm]


@events.test_start.add_listener
def begin(environment, **_) -> None:
    """Forget what was recorded before, and note the server's counters."""
    run.recorder.clear()
    run.first_scores.clear()
    if environment.parsed_options.metrics_url and not isinstance(environment.runner, WorkerRunner):
        run.metrics_before = scrape(environment.parsed_options.metrics_url)


@events.report_to_master.add_listener
def report(client_id, data, **_) -> None:
    """Send a worker's tallies to the master."""
    data["disranker"] = run.recorder.take_unsent()


@events.worker_report.add_listener
def merge(client_id, data, **_) -> None:
    """Add a worker's tallies on the master."""
    if "disranker" in data:
        run.recorder.merge(data["disranker"])


def land(worker: WorkerRunner) -> None:
    """Stop a worker's users, wait for their late answers, and send the master the last tallies."""
    worker.stop()
    worker.send_message("landed", run.recorder.take_unsent())


def take_landed(worker: str, tallies: dict[str, Any]) -> None:
    """Add a worker's last tallies on the master."""
    run.recorder.merge(tallies)
    run.landed.add(worker)


@events.test_stop.add_listener
def wait_for_late_answers(environment, **_) -> None:
    """Give requests that are still in flight their deadline; a master gives it to those of its workers.

    Locust's own end of a distributed run listens to the workers for half a second more: what was answered later was
    lost, and what had been sent was counted as unanswered.
    """
    deadline = clock() + environment.parsed_options.deadline_ms / 1000
    if not isinstance(environment.runner, MasterRunner):
        while run.outstanding and clock() < deadline:
            gevent.sleep(0.05)
        return
    run.landed.clear()
    environment.runner.send_message("land")
    while clock() < deadline + STOP_SECONDS:
        workers = {worker.id for worker in environment.runner.clients.all if worker.state != STATE_MISSING}
        if workers <= run.landed:
            break
        gevent.sleep(0.05)


@events.quitting.add_listener
def finish(environment, **_) -> None:
    """Write the JSON result and say in words what it holds."""
    if isinstance(environment.runner, WorkerRunner) or environment.runner is None:
        return
    if not run.recorder.tallies:
        # a run that failed to start has said why already; a master has no pool, and hears of no worker's failure
        if run.pool is not None or isinstance(environment.runner, MasterRunner):
            print("error: no request was sent", file=sys.stderr)
            environment.process_exit_code = environment.process_exit_code or 1
        return
    options = environment.parsed_options
    server = difference(run.metrics_before, settled(options.metrics_url)) if options.metrics_url else {}
    settings = {
        "users": [c.__name__ for c in environment.user_classes],
        **{name: getattr(options, name) for name in (
            "data", "split", "arms", "rate", "arrivals", "list_sizes", "zipf", "seed", "deadline_ms",
            "num_users", "run_time",
        )},
    }  # fmt: skip
    cpu = getattr(environment.runner, "current_cpu_usage", None)
    capacity = run.capacity.found if run.capacity is not None else None
    found = _results.result(run.recorder, settings, None if cpu is None else cpu / 100, server, capacity)
    for line in _results.lines(found):
        print(line, flush=True)
    if options.json_out:
        _results.write(found, Path(options.json_out))
        print(f"result: {options.json_out}", flush=True)
    searched = run.capacity.settings.arms if run.capacity is not None else None
    code = _results.exit_code(found, searched)
    # without a word from here Locust ends with 1 for any failed request, and for a simulated caller that died
    if code or (searched and not environment.runner.exceptions):
        environment.process_exit_code = environment.process_exit_code or code
