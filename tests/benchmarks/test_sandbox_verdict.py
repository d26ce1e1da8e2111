"""The verdict on a program in the sandbox cannot be forged, and values are transferred unchanged."""

from __future__ import annotations

import json
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lowmem.benchmarks.humaneval import sandbox_child
from lowmem.benchmarks.humaneval.sandbox import check

from tests.benchmarks.sandbox_helpers import QUICK, RIGHT, once, run, sandboxed, world  # noqa: F401  (world is a fixture)

pytestmark = sandboxed


# --- the verdict -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "detail"),
    [
        ("sys.exit(0)", "SystemExit: 0"),
        ("raise SystemExit", "SystemExit"),
        ("os._exit(0)", "exit code 0 before"),
        ("def f(x): os._exit(0)", "exit code 0 before"),
        ("def f(x): sys.exit(0)", "SystemExit: 0"),
        ("import atexit\natexit.register(lambda: os._exit(0))\nraise KeyboardInterrupt", "KeyboardInterrupt"),
        ("ctypes.string_at(0)", "SIGSEGV before"),
        ("os.abort()", "before the tests finished"),
        ("def f(x) return", "SyntaxError"),
        ("g = 1", "NameError: the answer defines no f"),
        ("def f(x): return 2", "AssertionError: assert candidate(1) == 1"),
        ("def f(x): return undefined", "NameError: name 'undefined'"),
        (
            "for end in range(1000):\n    try: os.close(end)\n    except OSError: pass" + RIGHT,
            "before the tests",
        ),
    ],
)
@once
def test_wrong_programs_do_not_pass(code, detail):
    outcome = run(code)
    assert outcome.kind == "failed"
    assert detail in outcome.detail
    assert "\n" not in outcome.detail


FORGERIES = {
    "equal to everything": """
class Same:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return 0
def f(x): return Same()
""",
    "an int that is equal": """
class Same(int):
    def __eq__(self, other): return True
def f(x): return Same(7)
""",
    "verdicts everywhere": """
for end in range(1, 64):
    for line in (b'passed', b'{"kind": "passed", "detail": ""}', b'{"value": null, "kind": "passed"}'):
        try: os.write(end, line + b'\\n')
        except OSError: pass
os._exit(0)
""",
    "builtins replaced": """
import builtins
builtins.AssertionError = Warning
builtins.compile = lambda *a, **k: None
builtins.exec = lambda *a: None
builtins.Exception = type('E', (BaseException,), {})
def f(x): return 2
""",
    "the harness replaced": """
import lowmem.benchmarks.humaneval.sandbox_child as c
c.encode = lambda v: v
c._send = lambda s, m: s.write(b'{"kind": "passed"}\\n') and s.flush()
def f(x): return 2
""",
    "the frames above": """
frame = sys._getframe()
while frame:
    frame.f_globals.update(check=lambda c: None)
    for value in list(frame.f_locals.values()):
        if isinstance(value, dict): value.update(test='def check(c): pass', kind='passed')
    frame = frame.f_back
def f(x): return 2
""",
    "garbage that knows": "import gc\nfor o in gc.get_objects():\n    if isinstance(o, dict) and 'test' in o:"
    " print('ESCAPED', o['test'])\ndef f(x): return 2",
    "an exception as result": "def f(x): raise StopIteration",
    "an exception that lies": "class AssertionError(Exception):\n    def __str__(self): return 1 / 0\n"
    "def f(x): raise AssertionError",
    "a deep result": "def f(x):\n    v = []\n    for _ in range(10**5): v = [v]\n    return v",
    "a strange message": 'import json\njson.dumps = lambda v: \'{"value": {"opaque": 1, "list": []}}\'\n'
    "def f(x): return 1",
    "an unknown kind": """
import json
json.dumps = lambda v: '{"value": {"__class__": []}}'
def f(x): return 1
""",
    "a deep message": "import json\njson.dumps = lambda v: '{\"value\": ' + '[' * 10**6\ndef f(x): return 1",
}


@once
@pytest.mark.parametrize("name", FORGERIES)
def test_a_pass_cannot_be_forged(name):
    outcome = run(FORGERIES[name])
    assert outcome.kind == "failed", outcome
    assert outcome.detail
    assert "ESCAPED" not in outcome.output


@once
def test_a_right_answer_passes_with_its_output():
    outcome = run("print('one', flush=True)\ndef f(x):\n    print('two', file=sys.stderr)\n    return x\n")
    assert (outcome.kind, outcome.detail) == ("passed", "")
    assert outcome.output == "one\ntwo\ntwo\n"


@once
def test_tests_can_use_definitions_of_the_prompt():
    outcome = check(
        "def f(s):\n    return s[::-1]\n",
        prompt="import math\ndef coded(s):\n    return s[::-1]\ndef f(s):\n    '''Decode.'''\n",
        test="def check(candidate):\n    assert candidate(coded('abc')) == f(coded('abc')) == 'abc'\n"
        "    assert math.isclose(1, 1)",
        entry_point="f",
        limits=QUICK,
    )
    assert outcome.kind == "passed"


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.complex_numbers(allow_nan=False)
    | st.fractions()
    | st.decimals(allow_nan=False),
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text() | st.integers(), inner)
        | st.frozensets(st.integers())
        | st.sets(st.text())
    ),
    max_leaves=10,
)


@once
@given(value=values)
@settings(max_examples=100, deadline=None)
def test_plain_values_are_transferred_unchanged(value):
    back = sandbox_child.decode(json.loads(json.dumps(sandbox_child.encode(value))))
    assert back == value
    assert repr(back) == repr(value) or isinstance(value, (set, frozenset, dict, list, tuple))


@once
def test_numbers_and_iterators_keep_their_types():
    for value in (
        10**5000,
        -(2**63),
        2**62,
        0.1,
        float("inf"),
        -0.0,
        Decimal("0.10"),
        Fraction(1, 3),
        range(3),
    ):
        back = sandbox_child.decode(sandbox_child.encode(value))
        assert type(back) is type(value) and back == value
    arrived = sandbox_child.decode(sandbox_child.encode(x for x in [1, (2,)]))
    assert arrived != [1, (2,)] and list(arrived) == [1, (2,)]
