"""A stand-in for the `vllm` command: it listens, has a child, and ends as $STAND_IN says.

ready       healthy after $STAND_IN_SECONDS; ends at SIGTERM
refuses     prints an error in vLLM's manner and exits with 1
dies        healthy, then an error and exit 1
never       is never healthy, and ignores SIGTERM
stubborn    healthy; ignores SIGTERM
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ERROR = """\
(EngineCore pid=77) ERROR 11-30 14:10:16 [core.py:1512] Traceback (most recent call last):
(EngineCore pid=77) ERROR 11-30 14:10:16 [core.py:1512]   File "core.py", line 1, in run
(EngineCore pid=77) ERROR 11-30 14:10:16 [core.py:1512] ValueError: Unsupported quantization config: bits=3
Traceback (most recent call last):
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        healthy = time.monotonic() - START > float(os.environ.get("STAND_IN_SECONDS", "0.3"))
        self.send_response(200 if healthy and MODE != "never" else 503)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


def main() -> int:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    record = {"words": sys.argv, "environment": dict(os.environ), "child": child.pid}
    Path(os.environ["STAND_IN_RECORD"]).write_text(json.dumps(record))
    print("(APIServer pid=76) INFO 11-30 14:10:10 [core.py:133] Loading the weights", flush=True)
    if MODE == "refuses":
        print(ERROR, flush=True)
        return 1
    if MODE in ("never", "stubborn"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # leaves its child behind
    words = dict(zip(sys.argv, sys.argv[1:], strict=False))
    server = ThreadingHTTPServer((words["--host"], int(words["--port"])), Handler)
    if MODE == "dies":
        import threading

        def die() -> None:
            time.sleep(1.5)
            print(ERROR.replace("bits=3", "later"), flush=True)
            os._exit(1)

        threading.Thread(target=die).start()
    server.serve_forever()
    return 0


START = time.monotonic()
MODE = os.environ.get("STAND_IN", "ready")
if __name__ == "__main__":
    sys.exit(main())
