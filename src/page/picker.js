// Clicking an object puts it into the scene or takes it out again; `props.value` holds the names.
const show = () => {
  for (const button of element.querySelectorAll("button"))
    button.setAttribute("aria-pressed", String((props.value || []).includes(button.dataset.name)));
};
element.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-name]");
  if (!button) return;
  const names = props.value || [];
  const name = button.dataset.name;
  props.value = names.includes(name) ? names.filter((n) => n !== name) : [...names, name];
  show();
  trigger("input");
});
watch("value", show);
show();
