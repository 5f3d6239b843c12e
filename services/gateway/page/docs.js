// Shows /openapi.json. Knows the parts of OpenAPI 3.1 that this document uses, and no more.

let api;
// Where the gateway is, without the slash at the end.
const base = new URL(".", location).href.slice(0, -1);

/** An element with attributes and children; text goes in as text, never as markup. */
function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children.flat().filter((child) => child !== null));
  return element;
}

/** Words with `code` in them. */
const prose = (words = "") =>
  words.split("`").map((part, at) => (at % 2 ? make("code", {}, part) : part));

const code = (text) => make("pre", { tabindex: 0 }, make("code", {}, text));

/** What a $ref points at, with its name. */
function resolve(value) {
  if (!value?.$ref) return value;
  const path = value.$ref.split("/").slice(1);
  return { name: path.at(-1), ...resolve(path.reduce((at, key) => at[key], api)) };
}

/** The type of a schema in words. */
function typeOf(given) {
  const schema = resolve(given);
  if (schema.anyOf) return schema.anyOf.map(typeOf).join(" or ");
  if (schema.type === "array") return `array of ${typeOf(schema.items)}`;
  if (schema.type === "object" && schema.name) return schema.name;
  if (schema.type) return [schema.type].flat().join(" or ");
  return typeof (schema.const ?? schema.enum?.[0] ?? "");
}

/** What a schema allows, in words. */
function boundsOf(given) {
  const schema = resolve(given);
  const { minimum, maximum, minItems = 0 } = schema;
  const bounds = [
    minimum === undefined ? null : minimum + (maximum === undefined ? " or more" : ` to ${maximum}`),
    schema.multipleOf && `a multiple of ${schema.multipleOf}`,
    schema.not?.multipleOf && `not a multiple of ${schema.not.multipleOf}`,
    (schema.enum ?? [schema.const]).map((value) => JSON.stringify(value)).join(", "),
    schema.type === "string" ? schema.format : null,
    schema.pattern,
    schema.maxItems && `${minItems} to ${schema.maxItems} of them`,
    schema.default === undefined ? null : `default ${schema.default}`,
  ];
  return bounds.filter(Boolean).join("; ");
}

/** A row for every field of a schema, and of what it is made of. */
function fieldsOf(given, path = "") {
  const schema = resolve(given);
  if (schema.items) return fieldsOf(schema.items, `${path}[]`);
  const choices = (schema.contentSchema ?? schema).anyOf?.filter((choice) => choice.$ref) ?? [];
  const inside = choices.flatMap((choice) =>
    fieldsOf(choice, choices.length > 1 ? `${path} (${resolve(choice).name})` : path));
  const fields = Object.entries(schema.properties ?? {}).flatMap(([name, field]) => {
    const at = path ? `${path}.${name}` : name;
    const row = [make("code", {}, at), typeOf(field), boundsOf(field), prose(resolve(field).description)];
    return [row, ...fieldsOf(field, at)];
  });
  return [...fields, ...inside];
}

function table(label, heads, rows) {
  if (rows.length === 0) return null;
  const head = make("tr", {}, heads.map((text) => make("th", { scope: "col" }, text)));
  const body = rows.map((cells) =>
    make("tr", {}, cells.map((cell, at) => make("td", { "data-head": heads[at] }, cell))));
  return make("table", { "aria-label": label }, make("thead", {}, head), make("tbody", {}, body));
}

function content([type, media]) {
  const { example = "" } = media;
  const text = typeof example === "string" ? example.trimEnd() : JSON.stringify(example, null, 2);
  const schema = resolve(media.schema);
  return [
    make("h4", {}, make("code", {}, type), " ", schema.name ?? ""),
    schema.description ? make("p", {}, prose(schema.description)) : null,
    table(`Fields of ${type}`, ["field", "type", "bounds", "description"], fieldsOf(media.schema)),
    text ? code(text) : null,
  ];
}

function answer([status, given]) {
  const response = resolve(given);
  const headers = Object.entries(response.headers ?? {}).map(([name, header]) => {
    const { required, schema, description } = resolve(header);
    return [make("code", {}, name), required ? "always" : "sometimes", boundsOf(schema), prose(description)];
  });
  const summary = make("summary", {}, make("strong", {}, status), " ", prose(response.description));
  const contents = Object.entries(response.content ?? {}).flatMap(content);
  const details = make("details", {}, summary,
    table(`Headers of ${status}`, ["header", "sent", "value", "description"], headers), contents);
  details.open = status === "200";
  return details;
}

/** A line for the shell for every form that the answer has. */
function curl(path, operation, parameters) {
  const given = parameters.filter((parameter) => parameter.example !== undefined);
  const at = given.filter((p) => p.in === "path")
    .reduce((at, p) => at.replace(`{${p.name}}`, encodeURIComponent(p.example)), path);
  const query = given.filter((p) => p.in === "query").map((p) => `${p.name}=${p.example}`).join("&");
  const types = Object.keys(operation.responses["200"]?.content ?? {});
  const flag = types.includes("text/event-stream") ? "-N " : "";
  const url = `'${base}${at}${query && "?"}${query}'`;
  const lines = types.slice(1).map((type) => `curl ${flag}-H 'Accept: ${type}' ${url}`);
  return code([`curl ${flag}${url}`, ...lines].join("\n"));
}

function access(operation) {
  const names = (operation.security ?? api.security ?? []).flatMap(Object.keys);
  if (names.length === 0) return "For everybody, without a token.";
  return `If the gateway asks for tokens: with ${names.join(" or ")}, see above.`;
}

function route(path, method, operation) {
  const parameters = (operation.parameters ?? []).map(resolve);
  const rows = parameters.map((p) => [
    make("code", {}, p.name), p.in + (p.required ? ", required" : ""), typeOf(p.schema),
    boundsOf(p.schema), prose(p.description),
  ]);
  const id = operation.operationId;
  const heads = ["name", "where", "type", "bounds", "description"];
  return make("section", { class: "route", id, "aria-labelledby": `${id}-title` },
    make("h2", { id: `${id}-title` },
      make("span", { class: "method" }, method.toUpperCase()), " ", make("code", {}, path)),
    make("p", {}, make("strong", {}, operation.summary)),
    operation.description ? make("p", {}, prose(operation.description)) : null,
    make("p", {}, access(operation)),
    curl(path, operation, parameters),
    rows.length ? make("h3", {}, "Parameters") : null, table("Parameters", heads, rows),
    make("h3", {}, "Answers"), Object.entries(operation.responses).map(answer));
}

function show() {
  const routes = Object.entries(api.paths).flatMap(([path, item]) =>
    Object.entries(item).map(([method, operation]) => [path, method, operation]));
  const links = routes.map(([path, method, { operationId, summary }]) =>
    [make("a", { href: `#${operationId}` }, `${method.toUpperCase()} ${path}`), summary]);
  const schemes = Object.entries(api.components.securitySchemes).map(([name, scheme]) =>
    [make("dt", {}, name), make("dd", {}, prose(scheme.description))]);
  document.getElementById("about").append(
    make("p", {}, `Version ${api.info.version}. `, prose(api.info.description)),
    make("h2", {}, "Routes"), table("Routes", ["route", "what it is"], links),
    make("h2", {}, "Access"), make("dl", {}, schemes.flat()));
  document.getElementById("main").append(...routes.map((given) => route(...given)));
  document.getElementById(location.hash.slice(1))?.scrollIntoView();
}

try {
  const response = await fetch("openapi.json");
  if (!response.ok) throw new Error(`it was answered with ${response.status}`);
  // A number that a script would round stays as it is written.
  const text = (await response.text()).replace(/:\s*(\d{16,})/g, ': "$1"');
  api = JSON.parse(text);
  show();
} catch (error) {
  const fault = document.getElementById("fault");
  fault.textContent = `/openapi.json cannot be shown: ${error.message}`;
  fault.hidden = false;
}
