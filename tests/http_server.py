"""The HTTP server of the stand-ins."""

import sys
from http.server import ThreadingHTTPServer
from typing import Any


class HttpServer(ThreadingHTTPServer):
    """Answers in threads that end with the process, and takes it quietly when a client hangs up.

    The standard library prints a traceback for that, into the captured errors of the test that runs at that moment.
    """

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)
