"""The personaliser over HTTP: ``python -m serving.service RUN --store users.db``. Its OpenAPI page is at ``/docs``.

One model per service, JSON in and out. It has no accounts: it listens on this machine alone unless told otherwise; whoever
opens it to others puts something in front of it that knows who may speak for which user.
"""

import argparse
import logging
import math
import sqlite3
import sys
import threading
from pathlib import Path
from typing import Annotated, Any

import torch

try:
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse, PlainTextResponse
    from pydantic import BaseModel, ConfigDict, Field
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
except ImportError as error:
    raise ImportError(f"{error.name} is missing: the service needs `pip install -e '.[serve]'`.") from error

import dynamic_sparse_adapters
from backbones.artefacts import ArtefactError
from meta.arguments import add_num_threads
from serving.personaliser import COUNTERS, Enrolled, Personaliser
from serving.records import PRECISIONS
from serving.store import LONGEST_ID, DamagedRecordError, StoreBusyError, StoreFullError, UnknownUserError

MEGABYTES = 8.0
"""Of a request's body, at most."""
MOST = 1024
"""Inputs of a request, at most."""
CONNECTIONS = 64
LOG = logging.getLogger("dsa")

UserId = Annotated[str, Field(min_length=1, max_length=LONGEST_ID, description="Any string.")]
Inputs = Annotated[
    list[Any],
    Field(
        min_length=1,
        max_length=MOST,
        description="Texts; or images as nested lists of numbers, channels first, scaled as the backbone reads them.",
        examples=[["a text"], [[[[0.0, 0.5], [1.0, 0.0]]]]],
    ),
]
Labels = Annotated[list[Annotated[int, Field(ge=0, lt=2**31, strict=True)]], Field(min_length=1, max_length=MOST)]
Price = Annotated[float | None, Field(allow_inf_nan=False, description="Cost weight; none: the policy's, or the one before.")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Shown(_Strict):
    """A user's labelled examples."""

    user: UserId
    inputs: Inputs
    labels: Labels
    cost_weight: Price = None


class Asked(_Strict):
    """Inputs, each for the user named beside it; ``unknown``: what somebody gets who is not enrolled."""

    users: Annotated[list[UserId], Field(min_length=1, max_length=MOST)]
    inputs: Inputs
    unknown: Annotated[str, Field(pattern="^(error|bare)$")] = "error"


class Named(_Strict):
    """Users to be forgotten."""

    users: Annotated[list[UserId], Field(min_length=1, max_length=MOST)]


class Answers(BaseModel):
    """``[M, C]`` logits, and the class of the largest."""

    logits: list[list[float]]
    classes: list[int]


class Forgotten(BaseModel):
    """How many of those named had been enrolled."""

    forgotten: int


def create_app(personaliser: Personaliser, megabytes: float = MEGABYTES) -> FastAPI:
    """An ASGI application.

    Args:
        personaliser: that answers; closed by whoever made it.
        megabytes: that a request's body may have (413 beyond).

    What is wrong with a request is answered with 404 (a user who is not enrolled), 413 (too large) or 422 (anything else); a
    store that is busy or full with 503 and 507. ``detail`` says what and what to do, and repeats nothing of the inputs. One
    request at a time is computed, with all of torch's threads; the others wait.
    """
    if not 0 < megabytes < math.inf:
        raise ValueError(f"megabytes of a request must be above 0, got {megabytes}.")
    app = FastAPI(title="Dynamic Sparse Adapters", version=dynamic_sparse_adapters.__version__)
    app.add_middleware(_Limit, most=int(megabytes * 1e6))
    turn = threading.Lock()
    said: dict[int | str, dict[str, Any]] = {code: {"description": text} for code, text in SAID.items()}

    @app.post("/enroll", responses=said)
    def enroll(shown: Shown) -> Enrolled:
        """Choose a mask, adapt, store."""
        with turn:
            return personaliser.enroll(shown.user, _inputs(shown.inputs), shown.labels, shown.cost_weight)

    @app.post("/update", responses=said)
    def update(shown: Shown) -> Enrolled:
        """New examples of an enrolled user."""
        with turn:
            return personaliser.update(shown.user, _inputs(shown.inputs), shown.labels, shown.cost_weight)

    @app.post("/predict", responses=said)
    def predict(asked: Asked) -> Answers:
        """Everybody by their own adapter."""
        with turn:
            logits = personaliser.predict(asked.users, _inputs(asked.inputs), asked.unknown)
        if not logits.isfinite().all():
            raise ValueError("the model's answer is not finite: inputs are too large; scale them as in training.")
        return Answers(logits=logits.tolist(), classes=logits.argmax(1).tolist())

    @app.post("/forget", responses=said)
    def forget(named: Named) -> Forgotten:
        """Erase users, from disk and memory."""
        return Forgotten(forgotten=personaliser.forget(*named.users))

    _watched(app, personaliser)
    app.add_exception_handler(RequestValidationError, _invalid)
    for kind, code in CODES.items():
        app.add_exception_handler(kind, _handler(code))
    return app


def _watched(app: FastAPI, personaliser: Personaliser) -> None:
    """What an operator reads."""

    @app.get("/stats")
    def stats() -> dict[str, float]:
        """Users enrolled and resident, bytes, and what was asked for so far."""
        return personaliser.stats()

    @app.get("/health")
    def health() -> dict[str, Any]:
        """That the service answers, and what it serves."""
        reference = personaliser.pathways.model.backbone.reference_inputs()
        return {
            "status": "ok",
            "classes": personaliser.pathways.model.num_classes,
            "pathways": list(personaliser.pathways.names),
            "input": list(reference.shape[1:]),
        }

    @app.get("/metrics", response_class=PlainTextResponse)
    def metrics() -> str:
        """The statistics as Prometheus reads them."""
        lines = []
        for name, value in personaliser.stats().items():
            lines.append(f"# TYPE dsa_{name} {'counter' if name in COUNTERS else 'gauge'}\ndsa_{name} {value}\n")
        return "".join(lines)


CODES: dict[type[Exception], int] = {
    UnknownUserError: 404,
    ValueError: 422,
    FloatingPointError: 422,
    DamagedRecordError: 500,
    StoreBusyError: 503,
    sqlite3.OperationalError: 500,  # the disk, or a file that cannot be written
    StoreFullError: 507,
}
SAID = {
    404: "A user is not enrolled.",
    413: "The body is too large.",
    422: "The request makes no sense.",
    503: "Another process is in the way.",
    507: "No room.",
}


def _handler(code: int) -> Any:
    def answer(request: Request, error: Exception) -> JSONResponse:
        LOG.warning("%s was answered with %d: %s", request.url.path, code, error)
        return JSONResponse({"detail": str(error)}, status_code=code)

    return answer


def _invalid(_: Request, error: Exception) -> JSONResponse:
    """What is wrong and where, without the inputs."""
    assert isinstance(error, RequestValidationError)
    wrong = [{name: each[name] for name in ("loc", "msg", "type")} for each in error.errors()[:10]]
    return JSONResponse({"detail": wrong}, status_code=422)


def _inputs(raw: list[Any]) -> Any:
    """Texts as they are, numbers as a tensor."""
    if all(isinstance(each, str) for each in raw):
        return raw
    try:
        return torch.tensor(raw, dtype=torch.float32)
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"inputs must be texts, or nested lists of numbers of one shape ({error}).") from error


class _Limit:
    """Answers bodies beyond so many bytes with 413, whether they are announced or just keep coming."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app, self._most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body, more = bytearray(), True
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if not announced.isdigit() or int(announced) > self._most:
            await self._refuse(scope, receive, send)
            return
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self._most:
                await self._refuse(scope, receive, send)
                return
        whole: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay() -> Message:
            return whole.pop() if whole else await receive()

        await self._app(scope, replay, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        said = f"a request may have {self._most} bytes; send fewer inputs at once."
        await JSONResponse({"detail": said}, status_code=413)(scope, receive, send)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m serving.service", description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a training run")
    parser.add_argument("--store", type=Path, required=True, help="database of the users, made if it is not there")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
    parser.add_argument("--port", type=int, default=8000, help="to listen on (default: 8000)")
    parser.add_argument("--slots", type=int, default=1024, help="users in memory at once (default: 1024)")
    parser.add_argument("--keep", type=int, default=0, help="latest examples per user kept for updates (default: none)")
    parser.add_argument("--precision", choices=PRECISIONS, default="float16", help="of stored weights (default: float16)")
    parser.add_argument("--body-megabytes", type=float, default=MEGABYTES, help="of a request at most (default: 8)")
    parser.add_argument("--store-megabytes", type=float, help="of the store at most (default: as many as there are)")
    add_num_threads(parser)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.num_threads)
    settings = {"slots": args.slots, "keep": args.keep, "precision": args.precision, "megabytes": args.store_megabytes}
    try:
        with Personaliser.from_run(args.run, args.store, **settings) as personaliser:
            app = create_app(personaliser, args.body_megabytes)
            uvicorn.run(app, host=args.host, port=args.port, limit_concurrency=CONNECTIONS)
    except (ValueError, OSError, ArtefactError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
