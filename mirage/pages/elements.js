"use strict";
// Shared by the pages' scripts. Text from data reaches the document through textContent and attributes, never as markup.
function readData(id) {
  return JSON.parse(document.getElementById(id).textContent);
}
function make(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name === "text") element.textContent = value;
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}
function isTyping(event) {
  return event.target.matches("input, select, textarea") || event.ctrlKey || event.metaKey || event.altKey;
}
