"""Tracing of the router's HTTP side: one span for each request, in the caller's trace where it names one."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ranking import tracing

_UNTRACED = ("/health", "/metrics", "/docs", "/openapi.json")  # asked by machines every few seconds


class TracedRequests:
    """ASGI middleware: continues the caller's `traceparent`, and answers with the one of the router's own span."""

    def __init__(self, app: ASGIApp):
        self._app = app
        self._paths: set[str] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. The span ends when the answer has left, before what runs after it (shadow calls)."""
        if scope["type"] != "http" or scope["path"].startswith(_UNTRACED):
            await self._app(scope, receive, send)
            return
        wanted = (tracing.TRACEPARENT.encode(), tracing.TRACESTATE.encode())
        carrier = {name.decode(): value.decode("latin-1") for name, value in scope["headers"] if name in wanted}
        self._paths = self._paths or {route.path for route in scope["app"].routes}
        # a name for every path that a stranger may think of would fill the collector
        name = f"{scope['method']} {scope['path'] if scope['path'] in self._paths else 'elsewhere'}"
        with tracing.continued(name, carrier, "server") as span:

            async def sent(message: Message) -> None:
                if message["type"] == "http.response.start":
                    status = message["status"]
                    span.set(status=status)
                    own = tracing.headers()
                    extra = [(name.encode(), value.encode()) for name, value in own.items()]
                    message["headers"] = [*message.get("headers", []), *extra]
                await send(message)
                if message["type"] == "http.response.body" and not message.get("more_body"):
                    span.end()

            await self._app(scope, receive, sent)
