"""Clients of a service: each carries out one order and tells how it ended for it."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import httpx
import numpy as np
from _soak_orders import DEATH, U8, Order, Variant, decode, encode

End = Literal["done", "failed", "cancelled", "refused", "vanished", "strange"]
_ENDS: Final = ("done", "failed", "cancelled")


@dataclass(frozen=True)
class Outcome:
    """How an order ended for its client.

    problem: what should not have happened; "": nothing.
    compared: whether a picture was compared.
    waited, ran: seconds, of jobs that tell them.
    """

    order: Order
    end: End
    problem: str = ""
    compared: bool = False
    waited: float | None = None
    ran: float | None = None


class Clients:
    """Clients of one service.

    expected: the picture of each variant, painted alone.
    second: seconds that one second of the orders' times lasts.
    """

    def __init__(self, client: httpx.AsyncClient, variants: Sequence[Variant], expected: Sequence[U8]) -> None:
        self._client, self._variants, self._expected = client, variants, expected
        self._files = [(encode(each.picture), encode(each.mask), encode(_erase(each))) for each in variants]
        self.second = 1.0

    async def carry_out(self, order: Order) -> Outcome:
        """One order, whatever happens."""
        ways: dict[str, Callable[[Order], Awaitable[Outcome]]] = {
            "native": self._ask_native, "openai": self._ask_openai, "a1111": self._ask_a1111,
        }  # fmt: skip
        way = self._vanish if order.fate == "vanishes" else ways[order.door]
        try:
            return await way(order)
        except (httpx.HTTPError, ValueError, KeyError) as error:
            return Outcome(order, "strange", f"{type(error).__name__}: {error}")

    async def _ask_native(self, order: Order) -> Outcome:
        """A job; it is followed by its events, which must have one end, and that must be what the job says later."""
        while True:
            answer = await self._post_job(order)
            if order.fate != "kills" or answer.status_code != 429:
                break
            await asyncio.sleep(0.05)  # this one has to get in
        if answer.status_code != 202:
            return _refuse(order, answer)
        id = answer.json()["id"]
        if order.fate == "cancels":
            await asyncio.sleep(order.patience * self.second)
            state = (await self._client.delete(f"/v1/jobs/{id}")).json()["state"]
            if state in _ENDS:  # it had ended, and is forgotten now
                return Outcome(order, state)
        ends = await self._follow(id)
        facts = (await self._client.get(f"/v1/jobs/{id}")).json()
        if ends != [facts["state"]]:
            return Outcome(order, "strange", f"its events ended {ends}, its state is {facts['state']!r}")
        seconds = facts["seconds"]
        if ends != ["done"]:
            wanted = {"kills": "failed", "cancels": "cancelled"}.get(order.fate)
            problem = "" if ends == [wanted] else f"it ended {ends[0]}: {facts['error']}"
            return Outcome(order, ends[0], problem)  # type: ignore[arg-type]
        picture = await self._client.get(f"/v1/jobs/{id}/images/0")
        return self._compare(order, picture.content, seconds["waited"], seconds["ran"])

    async def _post_job(self, order: Order) -> httpx.Response:
        image, mask, _ = self._files[order.variant]
        fields = self._variants[order.variant].fields | ({"prompt": DEATH} if order.fate == "kills" else {})
        return await self._client.post(
            "/v1/jobs", files={"image": image, "mask": mask}, data={"request": json.dumps(fields)}
        )

    async def _follow(self, id: str) -> list[str]:
        """The ends among a job's events."""
        async with self._client.stream("GET", f"/v1/jobs/{id}/events?previews=0") as events:
            names = [line[7:] async for line in events.aiter_lines() if line.startswith("event: ")]
        return [name for name in names if name in _ENDS]

    def _make_edit(self, order: Order, **more: str) -> dict[str, Any]:
        """The form of OpenAI's `images.edit`."""
        image, _, erased = self._files[order.variant]
        fields = {name: str(value) for name, value in self._variants[order.variant].fields.items()}
        return {"files": {"image": image, "mask": erased}, "data": fields | more}

    async def _ask_openai(self, order: Order) -> Outcome:
        answer = await self._client.post("/v1/images/edits", **self._make_edit(order))
        if answer.status_code != 200:
            return _refuse(order, answer)
        return self._compare(order, base64.b64decode(answer.json()["data"][0]["b64_json"]))

    async def _vanish(self, order: Order) -> Outcome:
        """Ask for a stream, and close the connection in the middle."""
        async with self._client.stream("POST", "/v1/images/edits", **self._make_edit(order, stream="true")) as answer:
            if answer.status_code != 200:
                await answer.aread()
                return _refuse(order, answer)
            await asyncio.sleep(order.patience * self.second)
        return Outcome(order, "vanished")

    async def _ask_a1111(self, order: Order) -> Outcome:
        image, mask, _ = self._files[order.variant]
        fields = dict(self._variants[order.variant].fields)
        subject = fields.pop("subject")
        body = {
            "init_images": [base64.b64encode(image).decode()], "mask": base64.b64encode(mask).decode(),
            "prompt": f"{fields['prompt']} <lora:{subject}:1>",
            "seed": fields["seed"], "steps": fields["num_inference_steps"],
        }  # fmt: skip
        answer = await self._client.post("/sdapi/v1/img2img", json=body)
        if answer.status_code != 200:
            return _refuse(order, answer)
        return self._compare(order, base64.b64decode(answer.json()["images"][0]))

    def _compare(self, order: Order, data: bytes, waited: float | None = None, ran: float | None = None) -> Outcome:
        picture, expected = decode(data), self._expected[order.variant]
        others = [k for k, each in enumerate(self._expected) if np.array_equal(each, picture)]
        same = picture.shape == expected.shape and bool((picture == expected).all())
        problem = "" if same else f"its picture is {f'that of variant {others[0]}' if others else 'of no request'}"
        return Outcome(order, "done", problem, True, waited, ran)


def _erase(variant: Variant) -> U8:
    """The picture as OpenAI's clients mark it: transparent is repainted."""
    return np.dstack([variant.picture, 255 - variant.mask])


def _refuse(order: Order, answer: httpx.Response) -> Outcome:
    if answer.status_code == 429 and "retry-after" in answer.headers:
        return Outcome(order, "refused")
    return Outcome(order, "strange", f"it was answered {answer.status_code}: {answer.text[:200]}")
