"""A browser as a device: a page that runs an ONNX folder in onnxruntime-web, inside headless Chromium on this machine.

    browser_transport.py  the transport: a work folder served to a page, one Chromium per program
    chromium.py           find Chromium, start it with a profile of its own, measure and end its processes
    page_server.py        HTTP server on 127.0.0.1 that gives the page its files and takes its results
    onnxruntime_web.py    download the pinned onnxruntime-web with npm
    page/                 the page and its agent, the equal of the Python agent in JavaScript

The runtime's side is `runtimes/browser_runtime.py`.
"""
