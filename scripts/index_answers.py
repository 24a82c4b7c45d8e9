"""Exit status 0 if a package index answers within seconds: `python index_answers.py URL`.

pip would try one that can't be reached again and again, with a warning each time. A certificate that is not trusted
here counts as an answer, since pip has settings of its own for that.
"""

from __future__ import annotations

import ssl
import sys
import urllib.error
import urllib.request

_TIMEOUT_S = 5


def answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=_TIMEOUT_S).close()
    except urllib.error.HTTPError:
        return False
    except urllib.error.URLError as error:
        return isinstance(error.reason, ssl.SSLError)
    except OSError:  # no answer in time
        return False
    return True


if __name__ == "__main__":
    sys.exit(not answers(sys.argv[1]))
