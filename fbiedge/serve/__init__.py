"""`fbiedge serve`: a model behind the HTTP interface that OpenAI's clients speak. README.md beside this says what it
answers; the parts are

    connection.py    one TCP connection, and how long it may take           uvicorn
    guards.py        who may ask: Host, API key, kind and size of a body
    protocol.py      what may be asked: JSON to dataclasses, or a clear 400  pydantic
    service.py       the model: a question to prompts of tokens
    scheduler.py     who is answered when: a queue, slots, one engine thread
    answers.py       what is answered: JSON and server-sent events
    app.py           the routes that put these together                      Starlette
"""
