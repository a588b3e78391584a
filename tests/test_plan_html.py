"""A plan in a notebook: the table as HTML, with colors by type."""

import html.parser

import jax
import jax.numpy as jnp
from flax import linen as nn

from qwix_train import QuantizationRule, plan, wrap_eval_step


class Cells(html.parser.HTMLParser):
    """Collects the cells of tables: their tag, their style and their text."""

    def __init__(self, text):
        super().__init__()
        self.cells, self.open = [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        if tag != "br":
            self.open.append(tag)
        if tag in ("th", "td"):
            self.cells.append([tag, dict(attrs).get("style", ""), ""])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("th", "td"):
            self.cells[-1][2] += data


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        for name in "abc":
            x = nn.Dense(4, name=name)(x)
        return x


X = jax.ShapeDtypeStruct((2, 4), jnp.float32)
RULES = [
    QuantizationRule(module_path="a", weight_qtype="int8", act_qtype="int8"),
    QuantizationRule(module_path="[<]|b", weight_qtype="int4"),
    QuantizationRule(module_path="<none>", weight_qtype="int4"),
]


def test_it_has_the_cells_of_the_table_and_a_color_for_each_type():
    made = plan(Model(), RULES, X)
    cells = Cells(made._repr_html_()).cells
    header = [text for tag, _, text in cells if tag == "th"]
    assert header == str(made).split("\n")[0].split()
    width = len(header)
    body = [cell for cell in cells if cell[0] == "td"]
    rows = [body[i : i + width] for i in range(0, len(body), width)]
    shown = [[text for _, _, text in row][:4] for row in rows]
    assert [row[0] for row in shown] == ["a", "b", "c"]
    assert [row[3] for row in shown] == ["a/kernel", "b/kernel", "-"]
    types = header.index("type")
    int8, int4, in_float = (row[types][1] for row in rows)
    assert int8 and int4 and int8 != int4 and not in_float
    # An activation has the color of its type, too.
    assert rows[0][types + 1][1] == int8


def test_what_a_user_wrote_is_escaped():
    text = plan(Model(), RULES, X)._repr_html_()
    assert "&lt;none&gt;" in text and "<none>" not in text


def test_a_plan_of_a_step_has_a_table_for_each_call():
    model = Model()

    def step(params, x):
        return model.apply(params, model.apply(params, x))

    params = jax.eval_shape(model.init, jax.random.key(0), X)
    text = plan(wrap_eval_step(step, RULES[:1]), params, X)._repr_html_()
    assert text.count("<table>") == 2
    assert "call 2 of 2" in text
    Cells(text)
