"""Strings that bite: what a tokenizer, a model's config or a user can bring into a page, and what must stay text.

Those that would act set `window.pwned`; a page on which that is set, or the title is another, has executed one.
"""

from __future__ import annotations

HIT = "window.pwned=1"
CORPUS = (
    # markup
    f"</script><script>{HIT}</script>",
    f"</SCRIPT ><script>{HIT}</script>",
    f"<script>{HIT}</script>",
    f"<img src=x onerror={HIT}>",
    f"<img src=x onerror={HIT}//",
    f"<svg onload={HIT}>",
    f"<svg/onload={HIT}>",
    f"<svg><script>{HIT}</script></svg>",
    f"<svg><animate onbegin={HIT} attributeName=x dur=1s>",
    f"<math><mtext><style><img src=x onerror={HIT}></style></mtext></math>",
    f"<body onload={HIT}>",
    "<iframe srcdoc='<script>parent.pwned=1</script>'>",
    "<iframe src=javascript:parent.pwned=1>",
    f"<details open ontoggle={HIT}>",
    f"<input autofocus onfocus={HIT}>",
    f"<video><source onerror={HIT}></video>",
    "<style>body{display:none}</style>",
    "</style><h1>gone</h1>",
    "</title><h1>gone</h1>",
    "</textarea></noscript></template>",
    f"<noscript><p title='</noscript><img src=x onerror={HIT}>'>",
    "<base href=https://example.org/>",
    "<meta http-equiv=refresh content=0;url=data:text/html,gone>",
    "<link rel=stylesheet href=https://example.org/x.css>",
    "<form action=https://example.org><button>send</button></form>",
    f"<a href=javascript:{HIT}>here</a>",
    "<!--",
    f"--><script>{HIT}</script>",
    f"<!--<script>{HIT}</script>",
    "<![CDATA[",
    f"]]><script>{HIT}</script>",
    "<?php echo 1 ?>",
    # attributes and strings
    f'" onmouseover="{HIT}" x="',
    f"' autofocus onfocus='{HIT}' x='",
    f'"><script>{HIT}</script>',
    f"';{HIT};//",
    f'";{HIT};//',
    f"`${{{HIT}}}`",
    f"${{{HIT}}}",
    f"{{{{constructor.constructor('{HIT}')()}}}}",
    "{% debug %}{{7*7}}#{7*7}<%= 7*7 %>",
    f"javascript:{HIT}",
    f"data:text/html,<script>{HIT}</script>",
    "\\u003cscript\\u003e\\x3cscript\\x3e\\",
    "__proto__",
    # entities
    "&lt;script&gt;",
    f"&lt;img src=x onerror={HIT}&gt;",
    f"&#60;img src=x onerror={HIT}&#62;",
    "&amp;amp;&nbsp;&notin;&",
    # what cannot be seen
    "\u2028\u2029",
    f"\u2028{HIT}\u2029",
    "\ud800",
    "\udfff\ud800",
    "\x00\x01\x08\x0b\x0c\x1b[31m\x7f",
    "\u202eabc\u202c\u2066x\u2069\u200f",
    "\u200b\u200c\u200d\ufeff\u00ad",
    "\u0301\u0327",
    "\r\n\t ",
    "",
    "\uffff\U0010ffff",
    "\U000e0041\U000e0042",
    # what is merely much
    "x" * 10_000,
    "<b>" * 3_000,
    "漢字 👩\u200d👧 שלום é\u0301",
)
assert len(CORPUS) >= 40
