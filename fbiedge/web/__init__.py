"""`fbiedge web`: a chat page on this machine; the model runs in the browser, with onnxruntime-web.

assets.py        the page's libraries, brought by npm once
description.py   what the page must know about a model
server.py        serves the page, the libraries and the model's files, and nothing else
page/            the page: HTML, CSS and JavaScript modules as the browser gets them
"""
