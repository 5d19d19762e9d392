"""The web application: a page, the images of the session, and four calls that the page makes."""

from __future__ import annotations

from importlib.resources import files
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.responses import FileResponse, JSONResponse
from pydantic import BaseModel, Field

from diffalign.errors import UserError
from diffalign.label.access import Access, guard
from diffalign.label.session import LabelSession
from diffalign.label.store import VoteConflict
from diffalign.label.tasks import Task, media_type
from diffalign.label.votes import Verdict, Vote

PAGE_FILES = {
    "index.html": "text/html; charset=utf-8",
    "label.js": "text/javascript; charset=utf-8",
    "label.css": "text/css; charset=utf-8",
}
Annotator = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^\S(.*\S)?$")]


class VoteBody(BaseModel):
    """A vote as the page sends it; images go by the names that the page knows them under."""

    id: Annotated[str, Field(min_length=8, max_length=64, pattern=r"^[\w-]+$")]
    annotator: Annotator
    task: Annotated[str, Field(max_length=64)]
    verdict: Verdict
    choice: str | None = None
    shown: Annotated[list[str], Field(min_length=1, max_length=16)]
    tags: dict[str, list[str]] = {}
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0


def create_app(session: LabelSession, access: Access) -> FastAPI:
    """Build the application.

    Args:
        session: what is asked, and where votes go.
        access: who may take part.
    """
    app = FastAPI(title="diffalign label", docs_url=None, redoc_url=None, openapi_url=None)
    guard(app, access)

    @app.exception_handler(UserError)
    def refused(request: Request, error: UserError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 409 if isinstance(error, VoteConflict) else 422)

    @app.get("/")
    def page() -> Response:
        return page_file("index.html")

    @app.get("/page/{name}")
    def page_file(name: str) -> Response:
        if name not in PAGE_FILES:
            raise HTTPException(404)
        return Response((files("diffalign.label") / "page" / name).read_bytes(), media_type=PAGE_FILES[name])

    @app.get("/images/{picture_id}")
    def image(picture_id: str) -> Response:
        path = session.picture(picture_id)
        if path is None:
            raise HTTPException(404, "no such image in this session")
        return FileResponse(path, media_type=media_type(path), headers={"Cache-Control": "private, max-age=3600"})

    @app.get("/api/session")
    def settings() -> dict[str, Any]:
        return {"mode": session.settings.mode, "tags": session.settings.tags}

    @app.get("/api/next")
    def upcoming(annotator: Annotated[Annotator, Query()]) -> dict[str, Any]:
        progress = session.progress(annotator)
        tasks = [_view(session, annotator, task) for task in progress.upcoming]
        return {"done": progress.done, "total": progress.total, "tasks": tasks}

    @app.get("/api/back")
    def back(annotator: Annotated[Annotator, Query()], before: str | None = None) -> dict[str, Any]:
        task = session.task_before(annotator, before)
        return {"task": task and _view(session, annotator, task)}

    @app.post("/api/votes")
    def submit(body: VoteBody) -> dict[str, Any]:
        return {"id": body.id, "new": session.submit(_vote(session, body))}

    return app


def _view(session: LabelSession, annotator: str, task: Task) -> dict[str, Any]:
    """What the page gets to know of a task: no file name, nothing of where an image comes from."""
    ids = [session.picture_id(task.images[index]) for index in session.shown(annotator, task)]
    vote = session.store.last_vote(annotator, task.id)
    given = None
    if vote is not None:
        name = [session.picture_id(image) for image in task.images]
        given = {
            "verdict": vote.verdict,
            "choice": None if vote.choice is None else name[vote.choice],
            "tags": {name[index]: names for index, names in vote.tags.items()},
        }
    return {"id": task.id, "prompt": task.prompt, "images": ids, "given": given}


def _vote(session: LabelSession, body: VoteBody) -> Vote:
    task = session.tasks.get(body.task)
    index = {session.picture_id(name): i for i, name in enumerate(task.images)} if task else {}
    named = {*body.shown, *body.tags, *([body.choice] if body.choice is not None else [])}
    if task is not None and not named <= set(index):
        raise UserError(f"the vote names an image that task {task.id} does not have")
    return Vote(
        id=body.id,
        annotator=body.annotator,
        task=body.task,
        verdict=body.verdict,
        choice=None if body.choice is None else index.get(body.choice),
        shown=tuple(index.get(name, -1) for name in body.shown),
        tags={index[name]: tuple(names) for name, names in body.tags.items() if name in index},
        seconds=body.seconds,
    )
