#include "durable/s3_xml.h"

#include <aws/common/byte_buf.h>
#include <aws/common/date_time.h>

#include <cmath>
#include <pugixml.hpp>

#include "durable/s3_checksums.h"

namespace sp {
namespace {

constexpr size_t kDocumentBytesMax = 16u << 20;  // A page of 1,000 keys of 1,024 bytes is below 2 MiB.

Result<pugi::xml_node> Root(pugi::xml_document* document, std::string_view text, const char* name) {
  if (text.size() > kDocumentBytesMax) return Error(StatusCode::kUnavailable, "the store's reply is too long");
  const pugi::xml_parse_result parsed = document->load_buffer(text.data(), text.size(), pugi::parse_default, pugi::encoding_utf8);
  if (!parsed) return Error(StatusCode::kUnavailable, std::string("the store's reply is no whole XML document: ") + parsed.description());
  const pugi::xml_node root = document->document_element();
  if (std::string_view(root.name()) != name) return Error(StatusCode::kUnavailable, std::string("the store's reply is no ") + name);
  return root;
}

std::string Unquoted(std::string text) {
  if (text.size() >= 2 && text.front() == '"' && text.back() == '"') return text.substr(1, text.size() - 2);
  return text;
}

}  // namespace

std::string XmlErrorCode(std::string_view document) {
  pugi::xml_document parsed;
  const auto root = Root(&parsed, document, "Error");
  return root ? root->child_value("Code") : "";
}

Result<std::string> XmlUploadId(std::string_view document) {
  pugi::xml_document parsed;
  SP_ASSIGN_OR_RETURN(const auto root, Root(&parsed, document, "InitiateMultipartUploadResult"));
  std::string id = root.child_value("UploadId");
  if (id.empty()) return Error(StatusCode::kUnavailable, "the store's reply has no UploadId");
  return id;
}

Result<XmlCompleted> XmlCompletedUpload(std::string_view document) {
  pugi::xml_document parsed;
  SP_ASSIGN_OR_RETURN(const auto root, Root(&parsed, document, "CompleteMultipartUploadResult"));
  XmlCompleted completed{Unquoted(root.child_value("ETag")), std::nullopt};
  if (completed.etag.empty()) return Error(StatusCode::kUnavailable, "the store's reply has no ETag");
  if (std::string_view(root.child_value("ChecksumType")) != "COMPOSITE") completed.crc32c = CrcFromBase64(root.child_value("ChecksumCRC32C"));
  return completed;
}

std::string XmlCompleteRequest(const std::vector<XmlPart>& parts) {
  pugi::xml_document document;
  pugi::xml_node root = document.append_child("CompleteMultipartUpload");
  root.append_attribute("xmlns") = "http://s3.amazonaws.com/doc/2006-03-01/";
  for (const XmlPart& part : parts) {
    pugi::xml_node node = root.append_child("Part");
    node.append_child("PartNumber").text().set(part.number);
    node.append_child("ETag").text().set(part.etag.c_str());
    if (part.crc32c) node.append_child("ChecksumCRC32C").text().set(CrcToBase64(*part.crc32c).c_str());
  }
  struct Text : pugi::xml_writer {
    void write(const void* data, size_t size) override { text.append(static_cast<const char*>(data), size); }
    std::string text;
  } writer;
  document.save(writer, "", pugi::format_raw, pugi::encoding_utf8);
  return std::move(writer.text);
}

Result<ListPage> XmlListPage(std::string_view document) {
  pugi::xml_document parsed;
  SP_ASSIGN_OR_RETURN(const auto root, Root(&parsed, document, "ListBucketResult"));
  ListPage page;
  for (const pugi::xml_node node : root.children("Contents")) {
    ObjectInfo info;
    info.key = node.child_value("Key");
    info.size_bytes = node.child("Size").text().as_ullong();
    info.modified_unix_s = UnixSecondsOfDate(node.child_value("LastModified"));
    page.objects.push_back(std::move(info));
  }
  if (root.child("IsTruncated").text().as_bool()) {
    page.next = root.child_value("NextContinuationToken");
    // A page that says there is more and not where would be read as the last one.
    if (page.next.empty()) return Error(StatusCode::kUnavailable, "the store's list is cut off and has no continuation token");
  }
  return page;
}

Result<XmlUploads> XmlUploadList(std::string_view document) {
  pugi::xml_document parsed;
  SP_ASSIGN_OR_RETURN(const auto root, Root(&parsed, document, "ListMultipartUploadsResult"));
  XmlUploads list;
  for (const pugi::xml_node node : root.children("Upload")) {
    list.uploads.push_back({node.child_value("Key"), node.child_value("UploadId"), UnixSecondsOfDate(node.child_value("Initiated"))});
  }
  list.more = root.child("IsTruncated").text().as_bool();
  list.next_key = root.child_value("NextKeyMarker");
  list.next_id = root.child_value("NextUploadIdMarker");
  if (list.more && list.next_key.empty()) return Error(StatusCode::kUnavailable, "the store's list of uploads is cut off and has no marker");
  return list;
}

int64_t UnixSecondsOfDate(std::string_view date) {
  aws_date_time parsed;
  const aws_byte_cursor text{date.size(), reinterpret_cast<uint8_t*>(const_cast<char*>(date.data()))};
  if (date.empty() || aws_date_time_init_from_str_cursor(&parsed, &text, AWS_DATE_FORMAT_AUTO_DETECT) != AWS_OP_SUCCESS) return 0;
  return static_cast<int64_t>(std::floor(aws_date_time_as_epoch_secs(&parsed)));
}

}  // namespace sp
