// What the judging page and the page of a search engine share.

const $ = id => document.getElementById(id);

async function ask(path, options) {
  const answer = await fetch(path, options);
  const content = await answer.json().catch(() => ({detail: answer.statusText}));
  if (!answer.ok) throw new Error(typeof content.detail === "string" ? content.detail : JSON.stringify(content.detail));
  return content;
}

// Offers queries on the empty page.
async function examples() {
  const {queries} = await ask("examples");
  $("examples").hidden = !queries.length;
  $("examples").append(...queries.map(query => {
    const button = element("button", "", query);
    button.type = "button";
    button.addEventListener("click", () => { $("query").value = query; $("search").requestSubmit(); });
    return button;
  }));
}

function element(tag, className, text) {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  made.dir = "auto";  // Arabic and Hebrew run from the right
  return made;
}

// The query's words are marked in titles, as text: nothing of a document is ever read as HTML. A word marks longer ones
// that begin with it, unless it is very short; in scripts without spaces it is marked wherever it stands.
function marked(made, text, query) {
  const words = [...new Intl.Segmenter(undefined, {granularity: "word"}).segment(query)].filter(part => part.isWordLike);
  const patterns = words.map(({segment}) => {
    const word = segment.replace(/[\\^$.*+?()[\]{}|]/g, "\\$&");
    if (/[\p{sc=Han}\p{sc=Hiragana}\p{sc=Katakana}\p{sc=Thai}\p{sc=Lao}\p{sc=Khmer}\p{sc=Myanmar}]/u.test(word)) return word;
    return "(?<![\\p{L}\\p{N}])" + word + (segment.length < 3 ? "(?![\\p{L}\\p{N}])" : "");
  });
  let done = 0;
  if (patterns.length) for (const hit of text.matchAll(new RegExp(patterns.join("|"), "giu"))) {
    made.append(text.slice(done, hit.index), element("mark", "", hit[0]));
    done = hit.index + hit[0].length;
  }
  made.append(text.slice(done));
  return made;
}
