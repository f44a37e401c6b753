"""Where the conversation appears: a terminal with line editing, or plain pipes and files.

In: answers, notes, a request for the next message. Out: bytes for people and for programs. Answers go to standard
output; notes go there too in a conversation at a terminal, else to standard error. Knows no model and no commands.
"""

import codecs
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, TextIO

from pocketlm.chat.echo import without_echo
from pocketlm.chat.wrapping import Wrapper, wrapped
from pocketlm.errors import PocketlmError
from pocketlm.signals import handled
from pocketlm.terminal_text import without_controls

DIM, BOLD = "\x1b[2m", "\x1b[1m"
RESET = "\x1b[0m"
PROMPT, CONTINUED = "> ", "… "
MAX_PIPED = 1 << 24  # characters of a message from a pipe: no context holds as many

Completer = Callable[[str], Iterable[str]]
"""The words that can take the place of the last word of an unfinished line."""


class OutputClosed(Exception):
    """Standard output cannot be written any more. `reason`: "" if its reader just ended, as in `| head -1`."""

    def __init__(self, error: OSError):
        enough = isinstance(error, BrokenPipeError) or (os.name == "nt" and error.errno == 22)  # 22: how Windows says it
        self.reason = "" if enough else error.strerror or str(error)
        super().__init__(self.reason)


class Console:
    """Standard input and output of one chat. `interactive`: a person types and reads at a terminal.

    `one_shot`: there is one answer, and standard output gets nothing else.
    """

    def __init__(self, stdin: TextIO | None, stdout: TextIO | None, stderr: TextIO | None, one_shot: bool = False):
        given = (stdin or sys.stdin, stdout or sys.stdout, stderr or sys.stderr)
        self.stdin, self.stdout, self.stderr = (stream or io.StringIO() for stream in given)  # None: closed by the shell
        for stream in (self.stdin, self.stdout, self.stderr):
            if hasattr(stream, "reconfigure"):  # what an encoding cannot hold becomes a question mark, not an exception
                errors = "surrogateescape" if stream is self.stdin else "replace"  # bytes of another encoding: see _decoded
                stream.reconfigure(errors=errors)  # pyright: ignore[reportAttributeAccessIssue]
        self.piped = not self.stdin.isatty()
        self.interactive = not (self.piped or one_shot) and self.stdout.isatty()
        self._dumb = os.environ.get("TERM") == "dumb"
        escapes = self.stdout.isatty() and not self._dumb and _escapes_work()
        self.colour = escapes and self.interactive and not os.environ.get("NO_COLOR")
        self._wrap = Wrapper(lambda: self._columns(self.stdout)).push if escapes else str
        self._at_line_start = True
        self._session: Any = None
        self._editing = False
        self._history: Path | None = None
        self._complete: Completer = lambda line: ()
        self._started = self._foreign = False
        self._read_ahead: list[str] = []  # lines from a pipe that are still to be handled
        self._asked: Callable[[], object] = lambda: None
        self._end: BaseException | None = None

    def use(self, complete: Completer, history: Path | None) -> None:
        """Set the completions and the history file of the line editor. To be called before the first `read`."""
        self._complete, self._history = complete, history

    def when_asked(self, begin: Callable[[], object]) -> None:
        """Set what is called once, when the first prompt is on the screen. To be called before the first `read`."""
        self._asked = begin

    def end(self, error: BaseException) -> None:
        """From another thread: make the line editor's `read`, the current or the next one, raise `error`."""
        self._end = error
        if self._session is not None and self._session.app.is_running:
            self._session.app.loop.call_soon_threadsafe(self._leave)

    def leave_editor(self, error: BaseException) -> bool:
        """From a signal handler: make the line editor's `read` raise `error`; False if there is no editor at work.

        While the editor starts or ends, its event loop must not be interrupted: it may still return a line.
        """
        if self._editing:
            self.end(error)
        return self._editing

    def _leave(self) -> None:
        if self._end is not None and not self._session.app.is_done:
            self._session.app.exit(exception=self._end)

    def _first_asked(self, *_: object) -> None:
        begin, self._asked = self._asked, lambda: None
        begin()

    # ---- out

    def write(self, text: str, style: str = "") -> None:
        """Write a part of an answer as it comes; on a terminal, lines are broken between words. Raises OutputClosed."""
        text = without_controls(text)
        if text:
            shown = self._wrap(text)
            self._at_line_start = shown.endswith("\n")
            self._emit(self.stdout, f"{style}{shown}{RESET}" if self.colour and style else shown)

    def _columns(self, stream: TextIO) -> int:
        try:
            return os.get_terminal_size(stream.fileno()).columns or 80
        except OSError:
            return 80

    def end_line(self) -> None:
        """Ends the line that an answer has begun."""
        if not self._at_line_start:
            self.write("\n")

    def note(self, text: str, style: str = DIM, indent: int = 0) -> None:
        """Print a remark of the program on lines of its own; on a terminal, lines are broken between words.

        `indent`: columns in front of continued lines, so that tables stay readable.
        """
        self.end_line()
        stream, text = self.stdout if self.interactive else self.stderr, without_controls(text)
        if stream.isatty():
            text = wrapped(text, self._columns(stream), indent)
        if self.colour and style:
            text = f"{style}{text}{RESET}"
        self._emit(stream, text + "\n")

    def _emit(self, stream: TextIO, text: str) -> None:
        try:
            stream.write(text)
            stream.flush()
        except OSError as error:
            raise OutputClosed(error) from None

    def give_up_output(self) -> None:
        """Send the rest of the output nowhere, so that Python does not flush it again on exit and print an error."""
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stdout.fileno())

    # ---- in

    def read(self) -> str:
        """The next message; a backslash at the end of a line continues it. Raises EOFError, KeyboardInterrupt."""
        self.end_line()
        if self.interactive and not self._dumb:
            return self._edited()
        lines = [self._line(PROMPT)]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            try:
                lines.append(self._line(CONTINUED))
            except EOFError:
                break
        return "\n".join(lines)

    def _line(self, prompt: str) -> str:
        if self.interactive:
            self._emit(self.stdout, prompt)
        line = self._read_ahead.pop(0) if self._read_ahead else self._next()
        if not line:
            raise EOFError
        return line.rstrip("\r\n")

    def _next(self) -> str:
        """The next line of standard input with its end; "" behind the last."""
        self._first_asked()
        try:
            line = self.stdin.readline(MAX_PIPED)
        except OSError:  # such as a terminal that is gone
            line = ""
        if not self._started:  # Windows shells put a byte order mark in front of what they pipe
            self._started, line = True, line.removeprefix("\ufeff")
        return line if line.isascii() else self._decoded(line)

    def _decoded(self, line: str) -> str:
        """A line of which some bytes are not in standard input's encoding. Windows' cmd has sent it in that of its console;
        elsewhere the letters are lost, which is said once.
        """
        encoding = getattr(self.stdin, "encoding", None)
        if not encoding or line.encode("utf-8", "ignore").decode() == line:
            return line
        data = line.encode(encoding, "surrogateescape")
        if page := _console_page():
            return codecs.code_page_decode(page, data, "replace", True)[0]  # pyright: ignore[reportAttributeAccessIssue]
        if not self._foreign:
            self._foreign = True
            self.note(f"some letters are lost: what comes is not {encoding.upper()}")
        return data.decode(encoding, "replace")

    def read_all(self, is_command: Callable[[str], bool]) -> str | None:
        """All of standard input as one message. None as soon as a line is a command: then `read` gives the lines one by one.

        Raises PocketlmError for more than MAX_PIPED characters.
        """
        size = 0
        while line := self._next():
            self._read_ahead.append(line)
            size += len(line)
            if is_command(line):
                return None
            if size > MAX_PIPED:
                advice = "shorten the text, or use --lines"
                raise PocketlmError(f"more than {MAX_PIPED:,} characters come through the pipe; {advice}")
        text, self._read_ahead = "".join(self._read_ahead), []
        return text.replace("\r\n", "\n").strip("\n")

    def _edited(self) -> str:
        if self._session is None:
            with handled([signal.SIGINT], signal.SIG_IGN):  # a module whose import is interrupted cannot be imported again
                self._session = _editor(self._complete, self._history)
            self._session.app.after_render += self._first_asked
        self._editing = True
        try:
            text = self._session.prompt(PROMPT, prompt_continuation=CONTINUED, pre_run=self._leave)
        except (EOFError, OSError) as error:
            if isinstance(error, OSError):  # a terminal that is gone: the editor's last words are still to be written
                self.give_up_output()
            raise self._end or EOFError from None
        finally:
            self._editing = False
        return text.encode("utf-8", "replace").decode()  # a terminal can deliver lone surrogates

    @contextmanager
    def interruptible(self) -> Iterator[threading.Event]:
        """While an answer comes: the first Ctrl-C sets the event, a second one raises KeyboardInterrupt."""
        stop = threading.Event()

        def pressed(signum: int, frame: Any) -> None:
            if stop.is_set():
                raise KeyboardInterrupt
            stop.set()

        if not self.interactive or threading.current_thread() is not threading.main_thread():
            yield stop
            return
        with handled([signal.SIGINT], pressed), nullcontext() if self._dumb else without_echo(self.stdin):
            yield stop


def _escapes_work() -> bool:
    """Whether this system's terminals obey escape sequences; on Windows, turn that on."""
    if os.name != "nt":
        return True
    import ctypes

    console = ctypes.windll.kernel32  # pyright: ignore[reportAttributeAccessIssue]
    output, mode = console.GetStdHandle(-11), ctypes.c_uint32()
    return bool(console.GetConsoleMode(output, ctypes.byref(mode)) and console.SetConsoleMode(output, mode.value | 4))


def _console_page() -> int:
    """The encoding of this program's console on Windows; 0 where there is none."""
    if os.name != "nt":
        return 0
    import ctypes

    return ctypes.windll.kernel32.GetConsoleOutputCP()  # pyright: ignore[reportAttributeAccessIssue]


def _editor(complete: Completer, history: Path | None) -> Any:
    """A line editor: history, Tab, several lines by Alt-Enter or a backslash, a pasted block as one message."""
    from prompt_toolkit.completion import Completer as ToolkitCompleter
    from prompt_toolkit.completion import Completion
    from prompt_toolkit.filters import is_searching
    from prompt_toolkit.history import FileHistory, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings
    from prompt_toolkit.shortcuts.prompt import CompleteStyle, PromptSession

    class Words(ToolkitCompleter):
        def get_completions(self, document: Any, complete_event: Any) -> Iterator[Completion]:
            line = document.text_before_cursor
            for word in complete(line):
                yield Completion(word, start_position=-len(line.rpartition(" ")[2]))

    class Inputs(FileHistory):
        def store_string(self, string: str) -> None:
            with suppress(OSError):  # a full disk, a folder that has gone: remembered until the end, and the chat goes on
                super().store_string(string)

    keys = KeyBindings()

    @keys.add("enter", filter=~is_searching)  # in a search it takes what was found
    def _(event: Any) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter", filter=~is_searching)
    def _(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    session = PromptSession(
        history=Inputs(str(history)) if history and _writable(history) else InMemoryHistory(),
        completer=Words(),
        complete_while_typing=False,
        complete_style=CompleteStyle.READLINE_LIKE,
        key_bindings=keys,
        multiline=True,
        enable_suspend=True,
    )
    for buffer in (session.default_buffer, session.search_buffer):
        buffer.on_text_insert += _join_halves
    session.app.renderer.cpr_not_supported_callback = None  # else it warns where a terminal does not say where the cursor is
    return session


def _join_halves(buffer: Any) -> None:
    """Windows' consoles deliver an emoji as two keys, the halves of its UTF-16."""
    before = buffer.document.text_before_cursor
    joined = before.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
    if len(joined) < len(before):
        buffer.document = type(buffer.document)(joined + buffer.document.text_after_cursor, len(joined))


def _writable(path: Path) -> bool:
    """Whether the file can be written. Creates it, readable for its owner only, if it is missing."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    except OSError:
        return False
    return True
