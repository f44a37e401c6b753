"""What a model says, in the page: Markdown as CommonMark's reference reads it, and text of which nothing becomes HTML."""

import re

import pytest
from browsing import alone_fixture, answers, chromium_fixture, server_fixture, visit_fixture  # noqa: F401

from pocketlm.chat import transcript

MARKDOWN = "(text) => { const all = make('div'); all.append(markdown(text)); return all.innerHTML }"

HOSTILE = """\
<script>window.hit = 1</script><img src=x onerror="window.hit = 2"><svg onload="window.hit = 3">
[click](javascript:window.hit=4) [page](https://example.org/a?b=c) <iframe srcdoc="x"></iframe>

```html
</code></pre><script>window.hit = 5</script>
```
"""
RENDERED = """\
# A *title*

- one
- **two**
  1. three

| a | b |
|---|---|
| `1` | 2 |

> said

a_b_c and ~~gone~~ and 2 * 3 * 4
"""


def test_what_a_model_says_is_text_and_some_markdown(server, visit, alone):
    conversation = transcript.Conversation(model=alone.name, model_id=alone.fingerprint, interactive=True)
    conversation.messages = [
        {"role": "user", "content": "<b>hi</b>"}, {"role": "assistant", "content": HOSTILE},
        {"role": "user", "content": "again"}, {"role": "assistant", "content": RENDERED},
    ]  # fmt: skip
    transcript.Record().save(conversation)
    page = visit()
    page.click("nav .open")
    page.wait_for_selector("li.assistant h2")
    assert page.evaluate("window.hit") is None
    assert page.locator("#log").locator("script, img, svg, iframe, b").count() == 0
    assert page.eval_on_selector_all("#log a", "links => links.map(a => a.href)") == ["https://example.org/a?b=c"]
    assert "<script>window.hit = 1</script>" in answers(page)[0]
    assert page.inner_text("#log pre") == "</code></pre><script>window.hit = 5</script>"
    last = page.locator("li.assistant .text").last
    assert last.locator("h2 em").inner_text() == "title"
    assert last.locator("ul > li").all_inner_texts()[0] == "one"
    assert last.locator("ul > li > ol > li").inner_text() == "three"
    assert last.locator("li strong").inner_text() == "two"
    assert last.locator("td").all_inner_texts() == ["1", "2"]
    assert last.locator("blockquote").inner_text() == "said"
    assert last.locator("p").last.inner_text() == "a_b_c and gone and 2 * 3 * 4"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("```f(2)``` gives 4\nafter", "<p><code>f(2)</code> gives 4<br>after</p>"),
        ("1. a\n   ```py\n   if x:\n       y\n   ```\n2. b",
         '<ol start="1"><li>a<div class="code"><pre><code>if x:\n    y</code></pre></div></li><li>b</li></ol>'),
        ("1. a\n- x\n- y\n2. b", '<ol start="1"><li>a</li></ol><ul><li>x</li><li>y</li></ul><ol start="2"><li>b</li></ol>'),
        ("Here:\n|a|b|\n|-|-|\n|`x\\|y`|2|", "<p>Here:</p><table><thead><tr><th>a</th><th>b</th></tr></thead><tbody>"
         "<tr><td><code>x|y</code></td><td>2</td></tr></tbody></table>"),
        ("- a\r\n- b\r\n~~~\r\nc\r\n~~~", '<ul><li>a</li><li>b</li></ul><div class="code"><pre><code>c</code></pre></div>'),
    ],
)  # fmt: skip
def test_markdown_as_models_write_it(visit, text, shown):
    """Nothing of it is lost, code can be copied, and numbers are those that the model gave."""
    html = visit().evaluate(MARKDOWN, text)
    assert re.sub(r'<button.*?</button>| tabindex="0" dir="ltr"', "", html) == shown


# Documents, with % between them and → for a tab
ANSWERS = r"""**Bold**, *italic*, ***both***, __bold__, _italic_, **bold *it* bold**, *it **bold***, **a
b**, snake_case_name, f(*a, **b)
%
Use `code with ** stars`, ``a ` b``, `a
b`, \*no\*, C:\dir, 2 * 3 * 4 ** 5 ** 6, ~~gone~~, ~5 km~, `unclosed and **bold
%
[Set](https://en.wikipedia.org/wiki/Set_(mathematics)), [a **b**](https://x.org "title"), [x](<https://x.org/a>), [[1]](https://x.org)
%
<https://x.org/a?b=1&c=2> [mail](mailto:a@b.c) [a], &lt;b&gt; &amp; <b>html</b>
[a](https://x.org/\(b\))
%
# One
## Two ##
text
### Three

Title
=====
Sub
---
text

---

more
***
#none
%
- a
→- b
→→- c
- d
  - e
- f
%
* a
    * b
        * c
* d

1. e

+ f
%
1. a
→- b
→- c
2. d
   1. e
%
3. three
4. four

text

5) five
%
- one
  goes **on
  here**
- two
lazy

  para
%
- ```py
  x
  ```
- > q
- # h
%
> a
lazy
> - b
> > c

after
 > d
%
````
```
inner
```
````
after
%
```
a
```python
→b
```

    x = 1
      y

text
    z
%
a | b | c
:-- | :-: | --:
1 | `2` | **3**

after
%
line
break\
back
%
1. **Title**: text
   - *sub*

2. **Other**

   para

%
*a **b***, ***a** b*, _a __b___, **a*b**, *a*b*, **, a * b*, “**q**”, (**x**), Cześć__no__tak, **日本語**です"""


def test_markdown_is_read_as_its_reference_reads_it(visit):
    page = visit()
    reference = pytest.importorskip("markdown_it", reason="markdown-it-py is the reference").MarkdownIt
    reader = reference("commonmark", {"breaks": True, "html": False}).enable(["table", "strikethrough"])
    for text in ANSWERS.replace("→", "\t").split("\n%\n"):
        assert _shown(page.evaluate(MARKDOWN, text)) == _wanted(reader.render(text))


def _wanted(html):
    for pattern, plain in [
        (r"(?<=<h)\d|(?<=</h)\d", lambda level: str(int(level[0]) + 1)),
        (r"(</?)s>", r"\1del>"),
        (r" />", ">"),
        (r' title="title"| style="text-align:left"', ""),
        (r"text-align:(\w+)", r"text-align: \1;"),
        ("&quot;", '"'),
    ]:
        html = re.sub(pattern, plain, html)
    return _without_gaps(html)


def _shown(html):
    html = re.sub(r'<button.*?</button>| (tabindex|dir|rel|target|title)="[^"]*"', "", html)
    return _without_gaps(re.sub(r'<div class="code">(.*?)</div>|(?<=<ol) start="1"', r"\1", html, flags=re.DOTALL))


def _without_gaps(html):
    """Without the differences between tight and loose lists, and the space around blocks."""
    html = re.sub(r'<code class="[^"]*">', "<code>", re.sub(r"\n+</code></pre>", "</code></pre>", html))
    html = re.sub(r"<li>\s*<p>(.*?)</p>", r"<li>\1", html, flags=re.DOTALL)
    return re.sub(r"\n*(</?(p|li|ul|ol|h\d|hr|table|thead|tbody|tr|td|th|blockquote|pre|br)\b[^>]*>)\n*", r"\1", html)


@pytest.mark.parametrize(
    ("text", "links"),
    [
        ("see https://x.org/a_b_c. Or (https://x.org/a), https://x.org/Set_(b)?", ["x.org/a_b_c", "x.org/a", "x.org/Set_(b)"]),
        ("**https://x.org/a** [https://x.org/b](https://x.org/b)", ["x.org/a", "x.org/b"]),
        ("[a](javascript:alert(1)) <javascript:alert(1)> [b](data:text/html,x) [c](#here) [d](//x.org) [e](file:///etc)", []),
        ("[![a](https://x.org/a.png)](https://x.org/b)", ["x.org/b"]),
        ("[**https://x.org/a** *<https://x.org/b>*](https://x.org/c)", ["x.org/c"]),
        ("[a](https://x.org/a&amp;b) <https://x.org/c&amp;d> https://x.org/e&amp;f", ["x.org/a&b", "x.org/c&d", "x.org/e&f"]),
        ("&quot;https://x.org/a&quot; &lt;https://x.org/b&gt;.", ["x.org/a", "x.org/b"]),
    ],
)
def test_links_lead_where_they_say(visit, text, links):
    page = visit()
    page.evaluate("(text) => $('log').append(markdown(text))", text)
    assert page.eval_on_selector_all("#log a", "all => all.map(a => a.href.replace('https://', ''))") == links
    assert page.locator("#log img, #log a a").count() == 0


REPEATED = ["`", "` ", "*", "*a ", "**a ", "_a __b ", "[", "[a](", "> ", "- ", "|-", "~~a", "<", "&", "\\", "# ", "  - a\n"]


def test_a_model_that_repeats_one_sign_does_not_hold_the_page(visit):
    """Where every sign makes a search to the end of the text, this takes many minutes."""
    page = visit()
    show = "([text, id]) => setTimeout(() => $('log').append(make('p', { id }, markdown(text).textContent)))"
    for n, sign in enumerate(REPEATED):
        page.evaluate(show, [sign * 20_000, f"n{n}"])
        page.wait_for_selector(f"#n{n}", state="attached")
