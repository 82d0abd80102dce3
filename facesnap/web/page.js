// What only the browser can do: paste, enlarge, keep this tab's portraits, go to the result. Gradio's events call it.
window.facesnap = {
  // The portraits of this tab and their settings. The pictures are kept as the browser's own, since the server's go.
  async keep(pictures, made, session, kept) {
    const fresh = [];
    for (const [number, settings] of (made ?? []).entries()) {
      const url = pictures?.[number]?.image?.url;
      if (!url || (kept ?? []).some((old) => old.url === url)) continue;
      const blob = await (await fetch(url)).blob();
      const own = URL.createObjectURL(blob);
      const words = settings.prompt ? `${settings.style}, ${settings.prompt}` : settings.style;
      fresh.push({
        settings: {...settings, url},
        tile: {image: {path: "", url: own, meta: {_type: "gradio.FileData"}}, caption: `${words}, seed ${settings.seed}`},
      });
    }
    if (fresh.length) this.show();
    const tiles = [...fresh.map((one) => one.tile), ...(session ?? [])].slice(0, 24);
    return [tiles, [...fresh.map((one) => one.settings), ...(kept ?? [])].slice(0, 24)];
  },

  // When the work begins, the result is brought into view; when it was over at once, then.
  began() {
    setTimeout(() => document.querySelector("#status progress[value='0']") && this.show(), 60);
  },
  show() {
    const result = document.querySelector("#result"), {top} = result.getBoundingClientRect();
    if (top < 0 || top + (innerWidth > 900 ? 240 : 400) > innerHeight) result.scrollIntoView({behavior: "smooth", block: "start"});
  },
};

// What was said about the last request is not about the next one: a complaint goes when something is changed.
for (const kind of ["input", "change"]) {
  document.addEventListener(kind, () => document.querySelector("#status .fs-error")?.setAttribute("hidden", ""));
}

// Gradio names every radio button otherwise; of one name they are one group, which Tab enters once and arrows go through.
// And an example's picture says the same as the words below it, which a screen reader need not hear twice.
const amend = () => {
  for (const set of document.querySelectorAll("fieldset")) {
    for (const radio of set.querySelectorAll("input[type=radio]")) if (radio.name !== set.id) radio.name = set.id;
  }
  for (const picture of document.querySelectorAll("#examples img:not([alt=''])")) picture.alt = "";
};
new MutationObserver(amend).observe(document, {childList: true, subtree: true});

// Pictures pasted anywhere go where photos go.
document.addEventListener("paste", (event) => {
  const files = [...(event.clipboardData?.files ?? [])].filter((file) => file.type.startsWith("image/"));
  const input = document.querySelector("#more input[type=file], #photo-foot input[type=file]")
    ?? document.querySelector("#references input[type=file]");
  if (!files.length || !input) return;
  event.preventDefault();
  const picked = new DataTransfer();
  files.forEach((file) => picked.items.add(file));
  input.files = picked.files;
  input.dispatchEvent(new Event("change", {bubbles: true}));
});

// A click on a portrait enlarges it; a click or Escape goes back.
document.addEventListener("click", (event) => {
  const picture = event.target.closest?.("#pictures, #session")
    && event.target.closest("button, .gallery-item, .thumbnail-item")?.querySelector("img");
  if (!picture) return;
  let dialog = document.querySelector("#fs-large");
  if (!dialog) {
    dialog = document.createElement("dialog");
    dialog.id = "fs-large";
    dialog.setAttribute("aria-label", "The portrait, enlarged");
    dialog.addEventListener("click", () => dialog.close());
    document.querySelector("gradio-app, body").append(dialog);
  }
  const large = new Image();
  [large.src, large.alt] = [picture.src, picture.alt];
  const close = document.createElement("button");
  close.textContent = "Close";
  dialog.replaceChildren(large, close);
  dialog.showModal();
});
