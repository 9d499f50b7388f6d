// From the head to what the tab in sight has made: its picture, its gallery, its token.
element.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();  // the address is the visitor's link
  const panel = [...document.querySelectorAll('[role="tabpanel"]')].find((one) => one.offsetParent);
  const made = panel?.querySelector(".get, .learn-class") ?? panel;
  if (!made) return;
  made.tabIndex = -1;
  made.focus();
  made.scrollIntoView({block: "start"});
});

// Arrows, Home and End go through the tabs: Gradio's own listen to clicks alone.
const WAYS = {ArrowLeft: (now) => now - 1, ArrowRight: (now) => now + 1, Home: () => 0, End: () => -1};
document.addEventListener("keydown", (event) => {
  const way = WAYS[event.key], tab = event.target.closest?.('[role="tab"]');
  if (!way || !tab || event.ctrlKey || event.metaKey || event.altKey) return;
  const tabs = [...tab.parentElement.querySelectorAll('[role="tab"]')];
  const next = tabs.at(way(tabs.indexOf(tab)) % tabs.length);
  event.preventDefault();
  next.focus();
  next.click();
});
