// What the explorer needs of the page around it: elements, the colour scheme, and plotly.js.
const shared = (window.polcaExplorer ??= {}); // the one name that all explorers of a page share

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== undefined && value !== false) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

function scheme() {
  const named = document.documentElement.dataset.theme; // Sphinx themes
  if (named === "dark" || named === "light") return named;
  const lab = document.body.dataset.jpThemeLight; // JupyterLab
  if (lab) return lab === "false" ? "dark" : "light";
  return matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
}

function onSchemeChange(react) {
  const observer = new MutationObserver(react);
  observer.observe(document.documentElement, { attributeFilter: ["data-theme"] });
  observer.observe(document.body, { attributeFilter: ["data-jp-theme-light"] });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", react);
}

function contentRoot() {
  const root = document.documentElement.dataset.content_root;
  return root ?? (typeof DOCUMENTATION_OPTIONS === "undefined" ? undefined : DOCUMENTATION_OPTIONS.URL_ROOT);
}

// Resolves to Plotly, or rejects with the address that failed. A book keeps its own copy, and asks nobody else.
function loadPlotly({ file, url, integrity }) {
  if (window.Plotly) return Promise.resolve(window.Plotly);
  return (shared.plotly ??= new Promise((resolve, reject) => {
    const root = contentRoot();
    const book = root !== undefined;
    const source = book ? { src: `${root}_static/${file}` } : { src: url, integrity, crossorigin: "" };
    const script = element("script", source);
    // Where require.js is on the page, parts of plotly.js would register there rather than load.
    const amd = window.define?.amd;
    if (amd) window.define.amd = undefined;
    script.onload = script.onerror = () => {
      if (amd) window.define.amd = amd;
      if (window.Plotly) return resolve(window.Plotly);
      shared.plotly = undefined; // the next explorer may try again
      script.remove();
      reject(new Error(script.src));
    };
    document.head.append(script);
  }));
}
