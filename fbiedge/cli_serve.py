"""The command `fbiedge serve`: a model behind the HTTP interface of OpenAI's clients."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .cli_support import extra, open_model


def serve(
    model: Annotated[Path | None, typer.Argument(help="model.onnx or model.gguf; default: the bundled model")] = None,
    host: Annotated[str, typer.Option(help="address to listen on; 0.0.0.0: all of the network")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any free one")] = 8080,
    slots: Annotated[int, typer.Option(help="answers generated at a time, each with a KV cache")] = 4,
    queue: Annotated[int, typer.Option(help="answers that may wait; more are told to come back (429)")] = 64,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="FBIEDGE_API_KEY", help="clients must send it; better in the environment, which others can't see"
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="of the model, for clients; default: the file's")] = None,
    max_prompt_tokens: Annotated[int | None, typer.Option(help="longest prompt; default: the context")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="longest answer; default: the context")] = None,
    request_timeout: Annotated[float, typer.Option(help="seconds from a question to the end of its answer")] = 600.0,
    client_timeout: Annotated[
        float, typer.Option(help="seconds a client may take to send a question or to take what was sent")
    ] = 30.0,
    max_body_bytes: Annotated[int, typer.Option(help="longest question")] = 1 << 20,
    max_connections: Annotated[int, typer.Option(help="clients at a time")] = 256,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="origin whose web pages may ask, *: all; may be given again; default: none")
    ] = None,
    allowed_host: Annotated[
        list[str] | None, typer.Option(help="another name that clients know this server by; may be given again")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="threads; by default and at most one for each core")] = None,
    accuracy_level: Annotated[str | None, typer.Option(help="activations: int8 or fp32; default: the model's")] = None,
    context: Annotated[
        int | None, typer.Option(help="tokens each slot holds; default: the model's most (a GGUF: in 2 GiB)")
    ] = None,
) -> None:
    """Serve a model to OpenAI's clients: chat and completions over HTTP, on this machine unless --host says otherwise."""
    from .serve.options import ServerOptions

    options = ServerOptions(
        host=host, port=port, slots=slots, queue=queue, api_key=api_key, name=name, max_prompt_tokens=max_prompt_tokens,
        max_tokens=max_tokens, request_timeout=request_timeout, client_timeout=client_timeout,
        max_body_bytes=max_body_bytes, max_connections=max_connections, cors_origins=tuple(cors_origin or ()),
        allowed_hosts=tuple(allowed_host or ()),
    )  # fmt: skip
    with extra("serve"):
        from .serve.server import serve as run
    run(open_model(model, threads, accuracy_level, context), options)
